"""The log of engine events: failures when they begin, change or end, and diagnostics once."""

import logging
from dataclasses import replace

import pytest

from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Mode, PairTerms, Role, SourceKind
from dp_extproc.observability.log import DiagnosticLog, EndpointStateLog, EngineLog, PairLog
from engines.test_capabilities import facts

REFUSED = EngineFailure(FailureKind.REFUSED, "no connection")
TIMEOUT = EngineFailure(FailureKind.TIMEOUT, "no answer")


@pytest.mark.parametrize(
    ("rounds", "lines"),
    [
        pytest.param([None, None], [], id="well"),
        pytest.param([REFUSED], ["a: refused: no connection"], id="begins"),
        pytest.param([REFUSED, REFUSED, REFUSED], ["a: refused: no connection"], id="goes-on"),
        pytest.param(
            [REFUSED, EngineFailure(FailureKind.REFUSED, "still none")], ["a: refused: no connection"], id="other-words"
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
def test_failures_are_logged_when_they_begin_change_or_end(
    rounds: list[EngineFailure | None], lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Beginnings are warnings, ends are information."""
    caplog.set_level(logging.INFO)
    log = EndpointStateLog(logging.getLogger("test"))

    for failure in rounds:
        log.note("a", failure)

    assert [record.message for record in caplog.records] == lines
    assert [record.levelname for record in caplog.records] == [
        "INFO" if "again" in line else "WARNING" for line in lines
    ]


def test_failures_of_endpoints_are_logged_apart(caplog: pytest.LogCaptureFixture) -> None:
    """The same failure of another endpoint is a line of its own."""
    log = EndpointStateLog(logging.getLogger("test"))

    log.note("a", REFUSED)
    log.note("b", REFUSED)

    assert [record.message for record in caplog.records] == ["a: refused: no connection", "b: refused: no connection"]


def test_diagnostics_are_logged_once_for_a_pool_and_role(caplog: pytest.LogCaptureFixture) -> None:
    """Another role has its own lines."""
    caplog.set_level(logging.INFO)
    log = DiagnosticLog(logging.getLogger("test"))
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


def endpoint(name: str, role: Role, pool: str = "m") -> Endpoint:
    return Endpoint(f"http://{name}", name, 1, pool, role)


def with_pages(tokens: int, role: Role) -> EngineFacts:
    mode = {Role.PREFILL: Mode.PREFILL, Role.DECODE: Mode.DECODE}[role]
    return replace(facts("0.5.23", mode), terms=PairTerms(page_size=tokens))


def test_differences_are_logged_when_they_begin_and_end(caplog: pytest.LogCaptureFixture) -> None:
    """The number of engines and of reads does not count, nor do engines of other pools."""
    caplog.set_level(logging.INFO)
    log = PairLog(logging.getLogger("test"))
    first, second = endpoint("d1", Role.DECODE), endpoint("d2", Role.DECODE)
    log.note(endpoint("p1", Role.PREFILL), with_pages(1, Role.PREFILL))
    log.note(endpoint("else", Role.DECODE, "other"), with_pages(8, Role.DECODE))
    log.note(first, with_pages(1, Role.DECODE))
    for _ in range(2):
        log.note(first, with_pages(2, Role.DECODE))
        log.note(second, with_pages(2, Role.DECODE))
    log.note(first, with_pages(1, Role.DECODE))
    assert len(caplog.records) == 1
    log.note(second, with_pages(1, Role.DECODE))

    begun, over = caplog.records
    assert (begun.levelname, over.levelname) == ("WARNING", "INFO")
    assert begun.getMessage() == (
        "pool m: page_size_differs: page_size is 1 on prefill and 2 on decode (prefill: http://p1; decode: http://d1), "
        'so they are never paired: the decode server would end itself at the first request ("Page size mismatch"); '
        "remedy: start both with the same --page-size"
    )
    assert over.getMessage() == "pool m: no servers differ any more in that page_size is 1 on prefill and 2 on decode"


def test_difference_ends_when_its_engine_is_removed(caplog: pytest.LogCaptureFixture) -> None:
    """An engine in another role than configured counts as removed."""
    caplog.set_level(logging.INFO)
    log = PairLog(logging.getLogger("test"))
    prefill, decode = endpoint("p", Role.PREFILL), endpoint("d", Role.DECODE)
    log.note(prefill, with_pages(1, Role.PREFILL))
    log.note(decode, with_pages(2, Role.DECODE))
    log.forget_all_but([prefill])
    log.note(decode, replace(with_pages(2, Role.DECODE), mode=Mode.UNIFIED))

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_group_is_logged_when_it_is_complete_and_when_it_is_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    """That groups cannot be paired with each other is intended, and no line of the log."""
    caplog.set_level(logging.INFO)
    log = PairLog(logging.getLogger("test"))
    endpoints = {
        (role, group): replace(endpoint(f"{role}-{group}", role), group=group)
        for role in (Role.PREFILL, Role.DECODE)
        for group in ("v1", "v2")
    }
    for (role, group), each in endpoints.items():
        log.note(each, with_pages(int(group[1:]), role))
    lines = ["pool m: group v1 is complete, so it gets requests", "pool m: group v2 is complete, so it gets requests"]
    assert [each.getMessage() for each in caplog.records] == lines

    caplog.clear()
    left = [each for key, each in endpoints.items() if key != (Role.DECODE, "v1")]
    log.forget_all_but(left)
    log.forget_all_but([each for each in left if each.group == "v2"])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("pool m: group v1 has no pair of prefill and decode any more")

    caplog.clear()
    log.forget_all_but([])
    assert [each.getMessage() for each in caplog.records] == ["pool m: group v2 is gone"]


def test_group_stays_complete_when_its_endpoints_are_described_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    """A reload may give the same engines a group or another source; they serve meanwhile, and are read again later."""
    caplog.set_level(logging.INFO)
    log = PairLog(logging.getLogger("test"))
    endpoints = [endpoint("p", Role.PREFILL), endpoint("d", Role.DECODE)]
    for each in endpoints:
        log.note(each, with_pages(1, each.role))
    assert caplog.records == []

    log.forget_all_but([replace(each, group="v1") for each in endpoints])
    log.forget_all_but([replace(each, group="v1", source=SourceKind.KUBERNETES) for each in endpoints])
    assert [each.getMessage() for each in caplog.records] == ["pool m: group v1 is complete, so it gets requests"]


DIFFERS = EngineFailure(FailureKind.DISAGREEMENT, "dp_size", page_was_read=True)


@pytest.mark.parametrize(
    ("events", "lines"),
    [
        pytest.param([REFUSED, None, None], ["refused", "well"], id="over"),
        pytest.param([REFUSED, None], ["refused"], id="over, as far as is known"),
        pytest.param([REFUSED, None, REFUSED], ["refused", "well", "refused"], id="over and back"),
        pytest.param([None, DIFFERS, None, DIFFERS, None, DIFFERS], ["disagreement"], id="goes on beside samples"),
        pytest.param([REFUSED, None, DIFFERS], ["refused", "disagreement"], id="changes beside a sample"),
        pytest.param([None, DIFFERS, None, None], ["disagreement", "well"], id="over beside samples"),
    ],
)
def test_failure_ends_only_if_none_follows_the_sample(
    events: list[EngineFailure | None], lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """None is a sample. A failure of the same round comes after it."""
    caplog.set_level(logging.INFO)
    log = EngineLog()
    engine = endpoint("a", Role.WORKER)

    for event in events:
        if event is None:
            log.sampled(engine, LoadPage(()), 0.0, 0.0)
        else:
            log.failed(engine, event, 0.0)

    kinds = ["well" if "well again" in each.message else each.message.split(": ")[1] for each in caplog.records]
    assert kinds == lines
