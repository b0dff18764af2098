"""The rules by which reports of sources become endpoints, in time that the tests set."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_extproc.config.discovery import MemberState
from dp_extproc.engines.model import Endpoint, Role, SourceKind
from dp_extproc.fleet.discovery.roster import DEBOUNCE_SECONDS, Change, DrainReason, Place, RoleSource, Roster
from dp_extproc.fleet.discovery.source import Member, Source

READY, NOT_READY, TERMINATING = MemberState
KEEP = 30.0
DECODE, PREFILL = Place("m", Role.DECODE), Place("m", Role.PREFILL)


class Silent:
    """A source whose reports are made by the test."""

    kind = SourceKind.DNS
    keep_for = KEEP

    async def run(self, listener: object) -> None:
        raise NotImplementedError


SILENT: Source = Silent()


def source(key: str, place: Place = DECODE, keep_for: float = KEEP) -> RoleSource:
    return RoleSource(key, place, SourceKind.DNS, f"dns {key}", keep_for, SILENT)


def static(*members: Member, place: Place = DECODE) -> RoleSource:
    return RoleSource("static", place, SourceKind.STATIC, "configuration", members=members)


def member(number: int, state: MemberState = READY, uid: str = "") -> Member:
    return Member(f"http://10.0.0.{number}:1", f"10.0.0.{number}", 1, state, uid)


@dataclass
class Story:
    """A roster, and the time."""

    sources: tuple[RoleSource, ...]
    joining: set[str] = field(default_factory=set)
    """Hosts whose engine was not found to be ready."""
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.roster = Roster(lambda endpoint: endpoint.host not in self.joining)
        self.roster.configure(self.sources, self.now)

    def report(self, key: str, *members: Member) -> Change | None:
        self.roster.snapshot(key, members)
        return self.later(DEBOUNCE_SECONDS)

    def fail(self, key: str, message: str = "no answer") -> Change | None:
        self.roster.failed(key, message, self.now)
        return self.later(DEBOUNCE_SECONDS)

    def later(self, seconds: float) -> Change | None:
        self.now += seconds
        return self.roster.advance(self.now)

    @property
    def numbers(self) -> list[int]:
        """The endpoints by the last number of their address."""
        return [int(each.host.rpartition(".")[2]) for each in self.roster.endpoints]


def reasons(change: Change | None) -> dict[str, DrainReason]:
    assert change is not None
    return {endpoint.host: reason for endpoint, reason in change.left}


def test_roster_has_static_members_at_once_and_in_their_order() -> None:
    """A configuration with nothing but lists needs no report."""
    story = Story((static(member(2), member(1)),))

    assert story.numbers == [2, 1]
    assert story.roster.is_complete
    assert story.roster.due == float("inf")


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        pytest.param([member(2)], DrainReason.MISSING, id="missing"),
        pytest.param([member(1, TERMINATING), member(2)], DrainReason.TERMINATING, id="terminating"),
        pytest.param([member(1, NOT_READY), member(2)], DrainReason.NOT_READY, id="not-ready"),
    ],
)
def test_endpoint_drains_at_once_while_another_is_ready(after: list[Member], reason: DrainReason) -> None:
    """The source reports on purpose what it reports of a single member."""
    story = Story((source("a"),))
    story.report("a", member(1), member(2))
    change = story.report("a", *after)

    assert story.numbers == [2]
    assert reasons(change) == {"10.0.0.1": reason}


@pytest.mark.parametrize(
    "after", [pytest.param([], id="empty"), pytest.param([member(1, NOT_READY), member(2, NOT_READY)], id="not-ready")]
)
def test_role_without_ready_members_keeps_the_last_ones_for_a_time(after: list[Member]) -> None:
    """A wrong answer does not empty a role; a right one does, later."""
    story = Story((source("a"),))
    story.report("a", member(1), member(2))

    assert story.report("a", *after) is None
    assert story.numbers == [1, 2]
    assert story.roster.due == pytest.approx(story.now + KEEP)
    assert reasons(story.later(KEEP)) == dict.fromkeys(("10.0.0.1", "10.0.0.2"), DrainReason.NOT_KEPT)
    assert story.numbers == []


def test_kept_endpoint_drains_when_it_terminates() -> None:
    """It would refuse the requests."""
    story = Story((source("a"),))
    story.report("a", member(1), member(2))
    story.report("a", member(1, TERMINATING), member(2, NOT_READY))

    assert story.numbers == [2]
    story.report("a", member(2, TERMINATING))
    assert story.numbers == []
    story.report("a")
    assert story.numbers == []


@pytest.mark.parametrize(
    "after",
    [
        pytest.param([member(2)], id="missing"),
        pytest.param([member(1, NOT_READY), member(2)], id="not-ready"),
        pytest.param([member(1, TERMINATING), member(2)], id="terminating"),
    ],
)
def test_endpoint_stays_until_another_one_takes_requests(after: list[Member]) -> None:
    """A fleet that is replaced as a whole serves all the time, but never by an engine that terminates."""
    story = Story((source("a"),), joining={"10.0.0.2"})
    story.report("a", member(1))
    story.later(2 * KEEP)
    story.report("a", *after)
    assert story.numbers == ([2] if after[0].state is TERMINATING else [1, 2])

    story.joining.clear()
    story.roster.reconsider()
    story.later(DEBOUNCE_SECONDS)
    assert story.numbers == [2]


def test_endpoint_of_a_list_drains_at_once_when_it_is_removed() -> None:
    """An operator removes it on purpose."""
    story = Story((static(member(1)),), joining={"10.0.0.2"})
    story.roster.configure([static(member(2))], story.now)

    assert story.numbers == [2]


def test_failing_source_keeps_its_members_without_limit() -> None:
    """The time of a kept endpoint begins when the source reports again."""
    story = Story((source("a"),))
    story.report("a", member(1))
    story.report("a")
    story.fail("a")
    story.later(100 * KEEP)
    assert story.numbers == [1]

    story.report("a")
    story.later(KEEP - 1)
    assert story.numbers == [1]
    story.later(1)
    assert story.numbers == []


def test_one_url_is_one_endpoint_of_the_first_source() -> None:
    """The duplicate is there for the log, and takes over when the first source lists the URL no longer."""
    story = Story((source("a", PREFILL), source("b")))
    story.report("a", member(1), member(2))
    story.report("b", member(2), member(3))

    assert [(each.host[-1], each.role) for each in story.roster.endpoints] == [
        ("1", Role.PREFILL),
        ("2", Role.PREFILL),
        ("3", Role.DECODE),
    ]
    assert story.roster.duplicates == {("http://10.0.0.2:1", "dns a", "dns b")}
    assert reasons(story.report("a", member(1))) == {"10.0.0.2": DrainReason.LISTED_ELSEWHERE}
    assert [each.role for each in story.roster.endpoints] == [Role.PREFILL, Role.DECODE, Role.DECODE]


def test_another_uid_at_a_url_is_another_engine() -> None:
    """One endpoint leaves, one joins. The old one may still be listed beside it."""
    story = Story((source("a"),))
    story.report("a", member(1, uid="old"))
    change = story.report("a", member(1, TERMINATING, "old"), member(1, uid="new"))

    assert reasons(change) == {"10.0.0.1": DrainReason.REPLACED}
    assert change is not None
    assert [each.uid for each in change.joined] == ["new"]


def test_engine_stays_when_another_source_has_its_uid() -> None:
    """Kubernetes may take the place of DNS, which has only addresses."""
    story = Story((source("dns"),))
    story.report("dns", member(1), member(2))
    story.roster.configure([source("kubernetes")], story.now)
    change = story.report("kubernetes", member(1, uid="one"), member(2, NOT_READY, "two"))

    assert change is not None
    assert [each.uid for each in change.endpoints] == ["one"]
    assert change.joined == ()
    assert reasons(change) == {"10.0.0.2": DrainReason.LISTED_ELSEWHERE}


def test_kept_endpoints_are_computed_at_most_every_tenth_of_a_second() -> None:
    """Each load page of hundreds of engines may be the one that ends their time."""
    story = Story((source("a"),), joining={"10.0.0.2"})
    story.report("a", member(1))
    story.report("a", member(2))
    computed = []

    def takes_none(endpoint: Endpoint) -> bool:
        computed.append(endpoint)
        return False

    story.roster._takes_requests = takes_none
    for _ in range(100):
        assert story.roster.reconsider()
        story.later(1.5 * DEBOUNCE_SECONDS / 100)

    assert story.numbers == [1, 2]
    assert len(computed) == 1


def test_changes_are_applied_at_most_every_tenth_of_a_second() -> None:
    """A burst of reports is one change."""
    story = Story((source("a"),))
    story.report("a", member(1))
    for number in range(3, 6):
        story.roster.snapshot("a", (member(1), member(number)))
        assert story.later(0.01) is None
    assert story.roster.due == pytest.approx(story.now - 0.03 + DEBOUNCE_SECONDS)
    story.later(DEBOUNCE_SECONDS)
    assert story.numbers == [1, 5]


def test_members_of_a_removed_source_stay_until_the_new_one_has_reported() -> None:
    """A reload that changes a source interrupts nothing."""
    story = Story((source("a"),))
    story.report("a", member(1), member(2))
    story.roster.configure([source("b")], story.now)
    assert story.numbers == [1, 2]

    assert reasons(story.report("b", member(2), member(3))) == {"10.0.0.1": DrainReason.UNCONFIGURED}
    assert story.numbers == [2, 3]
    change = story.roster.configure([static(member(4))], story.now)
    assert story.numbers == [4]
    assert reasons(change) == dict.fromkeys(("10.0.0.2", "10.0.0.3"), DrainReason.UNCONFIGURED)


def test_source_of_a_renamed_pool_keeps_its_members() -> None:
    """A pool is named after its models. The time for which members are kept goes on."""
    story = Story((source("a"),))
    story.report("a", member(1, NOT_READY), member(2))
    story.report("a", member(1, NOT_READY), member(2, NOT_READY))
    story.later(KEEP / 2)
    change = story.roster.configure([source("a", replace(DECODE, pool="m,n"))], story.now)

    assert [(each.host, each.pool) for each in change.endpoints] == [("10.0.0.2", "m,n")]
    assert change.left == ()
    story.later(KEEP / 2 - 1)
    assert story.numbers == [2]
    story.later(1)
    assert story.numbers == []


MEMBERS = st.builds(member, st.integers(1, 5), st.sampled_from(MemberState), st.sampled_from(["", "x", "y"]))
REPORTS = st.lists(MEMBERS, max_size=5).map(tuple) | st.none()
"""Members, or a failure."""
STEPS = st.lists(st.tuples(st.sampled_from("abc"), REPORTS, st.sampled_from([0.0, 0.05, 0.2, 20.0, 40.0])), max_size=20)
JOINING = st.sets(st.sampled_from([f"10.0.0.{number}" for number in range(1, 6)]))


def best(members: tuple[Member, ...]) -> dict[str, Member]:
    """Return the member that counts for each URL of one source."""
    order = [READY, NOT_READY, TERMINATING]
    return {each.url: each for each in sorted(members, key=lambda each: order.index(each.state))[::-1]}


@settings(max_examples=300, deadline=None)
@given(STEPS, JOINING)
def test_roster_keeps_its_rules_under_any_reports(
    steps: list[tuple[str, tuple[Member, ...] | None, float]], joining: set[str]
) -> None:
    """Two sources of one role, and one of another, report anything in any order."""
    story = Story((source("a"), source("b"), source("c", PREFILL)), joining)
    last: dict[str, tuple[Member, ...]] = {}
    failing: dict[str, bool] = dict.fromkeys("abc", False)
    for key, members, seconds in steps:
        before = story.roster.endpoints
        if members is None:
            story.roster.failed(key, "no answer", story.now)
        else:
            story.roster.snapshot(key, members)
            last[key] = members
        failing[key] = members is None
        change = story.later(seconds)
        endpoints = story.roster.endpoints
        if change is not None:
            assert change.endpoints == endpoints
            assert {each.url for each, _ in change.left} <= {each.url for each in before}
            assert set(change.joined) <= set(endpoints)
        if seconds >= DEBOUNCE_SECONDS:
            check(story, last, before)
    story.later(DEBOUNCE_SECONDS)
    story.later(2 * KEEP)
    story.later(2 * KEEP)
    for role, keys in ((Role.DECODE, "ab"), (Role.PREFILL, "c")):
        if not any(failing[key] for key in keys) and all(key in last for key in keys):
            ready = {url for key in keys for url, each in best(last[key]).items() if each.state is READY}
            assert {each.url for each in story.roster.endpoints if each.role is role} <= ready


def check(story: Story, last: dict[str, tuple[Member, ...]], before: tuple[object, ...]) -> None:
    """Check what holds whenever everything is applied."""
    endpoints = story.roster.endpoints
    urls = [each.url for each in endpoints]
    assert len(urls) == len(set(urls))
    first: dict[str, tuple[str, Member]] = {}
    for key in "abc":
        for url, each in best(last.get(key, ())).items():
            first.setdefault(url, (key, each))
    for url, (key, each) in first.items():
        found = [endpoint for endpoint in endpoints if endpoint.url == url]
        if each.state is TERMINATING:
            assert not found
        if each.state is READY:
            assert [(one.uid, one.role) for one in found] == [(each.uid, (PREFILL if key == "c" else DECODE).role)]
    taking = {
        (PREFILL if key == "c" else DECODE).role
        for key, one in first.values()
        if one.state is READY and one.host not in story.joining
    }
    for kept in endpoints:  # those that are not READY stay only while no other member of their role takes requests
        if kept.url not in first or first[kept.url][1].state is not READY:
            assert kept.url in {getattr(each, "url", "") for each in before}
            assert kept.role not in taking


@settings(deadline=None)
@given(st.sets(st.integers(1, 5), min_size=1), REPORTS)
def test_role_does_not_become_empty_at_once(numbers: set[int], after: tuple[Member, ...] | None) -> None:
    """Unless all of its endpoints terminate, or are other engines now."""
    story = Story((source("a"),))
    story.report("a", *map(member, numbers))
    listed = {}
    if after is None:
        story.fail("a")
    else:
        story.report("a", *after)
        listed = best(after)

    if not story.roster.endpoints:
        ended = [listed[member(number).url] for number in numbers]
        assert all(each.state is TERMINATING or each.uid for each in ended)
