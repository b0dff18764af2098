"""What the log has about sources that list no endpoints, or that fail."""

import logging

import pytest

from dp_extproc.engines.model import LoadPage, Role, SourceKind
from dp_extproc.fleet.discovery.log import DiscoveryLog
from dp_extproc.fleet.discovery.roster import Place, RoleSource, Roster
from dp_extproc.fleet.discovery.source import Member
from dp_extproc.fleet.discovery.static import members_of
from fleet.discovery.test_roster import SILENT

EMPTY = (
    "dns a lists no endpoints (pool m, decode); the last ones, if there were any, stay for 30s; "
    "check the name, and that engines are ready behind it"
)


def test_empty_source_is_logged_once_until_it_lists_endpoints_again(caplog: pytest.LogCaptureFixture) -> None:
    """A mistake in a name is an empty answer. Without a line the service would be not ready for no visible reason."""
    roster = Roster(lambda _endpoint: True)
    place = Place("m", Role.DECODE)
    configured = RoleSource("static", place, SourceKind.STATIC, "configuration", members=members_of(()))
    roster.configure([configured, RoleSource("a", place, SourceKind.DNS, "dns a", 30.0, SILENT)], 0.0)
    log = DiscoveryLog(lambda: ())

    def lines(*members: Member) -> list[str]:
        caplog.clear()
        roster.snapshot("a", members)
        for _ in range(2):
            log.review(roster)
        return [record.getMessage() for record in caplog.records]

    log.review(roster)
    assert caplog.records == []  # it has not reported yet
    assert lines() == [EMPTY]
    assert lines(Member("http://10.0.0.1:1", "10.0.0.1", 1)) == []
    assert lines() == [EMPTY]
    assert lines() == []


def test_endpoint_that_changes_its_role_is_logged_like_another_one(caplog: pytest.LogCaptureFixture) -> None:
    """It leaves one role, joins the other, and gets requests there when it was read."""
    caplog.set_level(logging.INFO, "dp_extproc.fleet")
    roster = Roster(lambda _endpoint: True)
    places = {role: Place("m", role) for role in (Role.PREFILL, Role.DECODE)}
    roster.configure([RoleSource(role, at, SourceKind.DNS, role, 30.0, SILENT) for role, at in places.items()], 0.0)
    log = DiscoveryLog(lambda: ())
    for number, role in enumerate((Role.PREFILL, Role.DECODE), start=1):
        for each in places:
            roster.snapshot(each, (Member("http://10.0.0.1:1", "10.0.0.1", 1),) if each is role else ())
        change = roster.advance(float(number))
        assert change is not None
        log.change(change)
        log.review(roster)
        log.sampled(change.endpoints[0], LoadPage(()), 0.0, 0.0)

    assert [line for record in caplog.records if "10.0.0.1" in (line := record.getMessage())] == [
        "http://10.0.0.1:1 joins pool m as prefill",
        "http://10.0.0.1:1 gets requests from now on",
        "http://10.0.0.1:1 drains: another source lists it now",
        "http://10.0.0.1:1 joins pool m as decode",
        "http://10.0.0.1:1 is gone: it has no more requests",
        "http://10.0.0.1:1 gets requests from now on",
    ]


def test_failure_is_logged_once_for_each_of_a_few_reasons(caplog: pytest.LogCaptureFixture) -> None:
    """In an outage of an hour a source tries hundreds of times, and the reasons alternate or have numbers in them."""
    roster = Roster(lambda _endpoint: True)
    roster.configure([RoleSource("a", Place("m", Role.DECODE), SourceKind.DNS, "dns a", 30.0, SILENT)], 0.0)
    log = DiscoveryLog(lambda: ())

    def lines(*reasons: str) -> list[str]:
        caplog.clear()
        for reason in reasons:
            roster.failed("a", reason, 0.0)
            log.review(roster)
        return [record.getMessage().rpartition(": ")[2] for record in caplog.records]

    assert lines(*["refused", "timeout"] * 50) == ["refused", "timeout"]
    assert len(lines(*(f"502, request {number}" for number in range(100)))) == 3
    roster.snapshot("a", (Member("http://10.0.0.1:1", "10.0.0.1", 1),))
    log.review(roster)
    assert lines("refused") == ["refused"]
