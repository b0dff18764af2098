"""Trouble is said when it begins, changes or ends, and at no other time."""

import logging

import pytest

from dp_extproc.fleet.endpoint import Endpoint, Mode, Role
from dp_extproc.fleet.observer import FailureKind, ScrapeFailure
from dp_extproc.fleet.trouble import TrapLog, TroubleLog
from fleet.test_recipe import facts

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


def test_pitfalls_are_said_once_for_a_pool_and_role(caplog: pytest.LogCaptureFixture) -> None:
    """What all servers of a role have in common is one line with the remedy; another role has its own lines."""
    caplog.set_level(logging.INFO)
    log = TrapLog(logging.getLogger("test"))
    old = facts("0.5.9", Mode.DECODE)
    for number in range(3):
        log.note(Endpoint(f"http://d{number}", "h", 1, "m", Role.DECODE), old)
    log.note(
        Endpoint("http://w", "h", 1, "m", Role.WORKER), facts("0.5.23", Mode.UNIFIED, method="follow_bootstrap_room")
    )

    codes = [record.getMessage().split(": ")[:2] for record in caplog.records]
    assert codes == [
        ["http://d0", "foreign_rank_is_fatal"],
        ["http://d0", "paths_refused"],
        ["http://d0", "decode_rank_not_controllable"],
        ["http://w", "worker_follows_rooms"],
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "INFO", "WARNING"]
    assert all("; remedy: " in record.getMessage() for record in caplog.records)
