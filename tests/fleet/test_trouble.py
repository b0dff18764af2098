"""Trouble is said when it begins, changes or ends, and at no other time."""

import logging

import pytest

from dp_extproc.fleet.observer import FailureKind, ScrapeFailure
from dp_extproc.fleet.trouble import TroubleLog

REFUSED = ScrapeFailure(FailureKind.REFUSED, "no connection")
TIMEOUT = ScrapeFailure(FailureKind.TIMEOUT, "no answer")


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        pytest.param([None, None], [], id="well"),
        pytest.param([REFUSED], ["a: refused: no connection"], id="begins"),
        pytest.param([REFUSED, REFUSED, REFUSED], ["a: refused: no connection"], id="goes-on"),
        pytest.param(
            [REFUSED, ScrapeFailure(FailureKind.REFUSED, "still none")], ["a: refused: no connection"], id="other-words"
        ),
        pytest.param([REFUSED, TIMEOUT], ["a: refused: no connection", "a: timeout: no answer"], id="changes"),
        pytest.param(
            [REFUSED, None, None], ["a: refused: no connection", "a is well again (was: refused)"], id="is-over"
        ),
        pytest.param(
            [REFUSED, None, REFUSED],
            ["a: refused: no connection", "a is well again (was: refused)", "a: refused: no connection"],
            id="comes-back",
        ),
    ],
)
def test_said(rounds: list[ScrapeFailure | None], said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A row of rounds gives these lines: trouble as warnings, its end as information."""
    caplog.set_level(logging.INFO)
    log = TroubleLog(logging.getLogger("test"))

    for failure in rounds:
        log.note("a", failure)

    assert [record.message for record in caplog.records] == said
    assert [record.levelname for record in caplog.records] == [
        "INFO" if "again" in line else "WARNING" for line in said
    ]


def test_endpoints_are_apart(caplog: pytest.LogCaptureFixture) -> None:
    """The same trouble of another endpoint is news."""
    log = TroubleLog(logging.getLogger("test"))

    log.note("a", REFUSED)
    log.note("b", REFUSED)

    assert [record.message for record in caplog.records] == ["a: refused: no connection", "b: refused: no connection"]
