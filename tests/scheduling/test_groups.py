"""Revision groups: requests stay in one, and weights divide them, while another group serves what one cannot."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc import contract
from dp_extproc.config.groups import GroupSettings
from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import HostPolicy
from dp_extproc.config.reliability import AdmissionSettings
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import EngineFacts, LoadPage, PairTerms, RankSample, Role
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Decision, RequestContext, SchedulingResult
from fleet_fixtures import Fleet, make_facts

GONE = EngineFailure(FailureKind.REFUSED, "no connection")
Groups = Sequence[str | None]
OFF = AdmissionSettings(max_token_ratio=None, max_request_ratio=None)


class Pool:
    """A pool whose endpoints have these groups."""

    def __init__(
        self,
        prefills: Groups = (),
        decodes: Groups = (),
        workers: Groups = (),
        weights: Mapping[str, float] | None = None,
        **more: Any,
    ) -> None:
        def make(role: Role, groups: Groups) -> list[EngineFacts]:
            return [make_facts(role, ranks=2) for _ in groups]

        self.fleet = Fleet(
            prefills=make(Role.PREFILL, prefills),
            decodes=make(Role.DECODE, decodes),
            workers=make(Role.WORKER, workers),
            **more,
        )
        groups = [*prefills, *decodes, *workers]
        endpoints = [replace(each, group=group) for each, group in zip(self.fleet.endpoints, groups, strict=True)]
        self.fleet.load.update(endpoints, 5.0)
        self.configure(weights or {})
        self.numbers = count()

    def configure(self, weights: Mapping[str, float], admission: AdmissionSettings = OFF) -> None:
        pool = self.fleet.pool.model_copy(update={"groups": GroupSettings.model_construct(weights=weights)})
        self.fleet.scheduler.configure([pool], LoadSignal.ESTIMATE, admission)

    def all_of(self, group: str | None, *roles: Role) -> list[EndpointLoad]:
        return [
            each
            for each in self.fleet.load.by_url.values()
            if each.group == group and (not roles or each.role in roles)
        ]

    def schedule(self, **context: Any) -> SchedulingResult:
        """Schedule a request with a prompt of its own, which ends at once."""
        body = b'{"prompt":"%d %s"}' % (next(self.numbers), b"hello " * 50)
        found = self.fleet.scheduler.place(Api.COMPLETIONS, body, RequestContext(**context))
        if isinstance(found, Decision):
            assert found.in_flight is not None
            found.in_flight.end(self.fleet.clock())
        return found

    def group(self, **context: Any) -> str | None:
        """Schedule a request, and return its group. Its endpoints are of one group, or of none."""
        decision = self.schedule(**context)
        assert isinstance(decision, Decision), decision
        addresses = {value.decode() for name, value in decision.headers if name in TARGETS}
        groups = {each.group for each in self.fleet.load.by_url.values() if each.address in addresses} - {None}
        assert len(groups) <= 1, groups
        group = next(iter(groups), None)
        assert decision.metadata.get(contract.META_GROUP) == group
        return group

    def groups(self, requests: int = 400, **context: Any) -> Counter[str | None]:
        return Counter(self.group(**context) for _ in range(requests))


TARGETS = {contract.PREFILL_HOST, contract.DECODE_HOST}
TWO: Groups = ("v1", "v1", "v2")
"""Two endpoints of v1, and one of v2."""
SHAPES = [
    pytest.param({"prefills": TWO, "decodes": TWO}, id="disaggregated"),
    pytest.param({"workers": TWO}, id="aggregated"),
    pytest.param({"prefills": (None,), "decodes": TWO}, id="prefill-of-all"),
]


@pytest.mark.parametrize("host", list(HostPolicy))
def test_endpoints_of_two_groups_are_never_paired(host: HostPolicy) -> None:
    """The engines agree in all that they report, and all groups get requests; None is paired with any group."""
    pool = Pool((*TWO, None), (*TWO, None), policy={"host": host})

    assert {*pool.groups(200)} >= {"v1", "v2"}


def test_equal_group_is_still_compared_by_facts() -> None:
    """A label is no proof: the engines of v2 would fail, so v1 alone gets requests."""
    pool = Pool(("v1", "v2"), ("v1", "v2"))
    (decode,) = pool.all_of("v2", Role.DECODE)
    facts = replace(decode.facts, terms=PairTerms(page_size=64))
    (prefill,) = pool.all_of("v2", Role.PREFILL)
    pool.fleet.load.discovered(decode.configured, decode.address, facts, 0.0)
    other = replace(prefill.facts, terms=PairTerms(page_size=1))
    pool.fleet.load.discovered(prefill.configured, prefill.address, other, 0.0)

    assert pool.groups(50) == {"v1": 50}


def test_refusal_names_the_groups_that_have_no_pair() -> None:
    """The operator reads which role of which group is missing."""
    refusal = Pool(("v1",), ("v2",)).schedule()

    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (503, Reason.NO_COMPATIBLE_PAIR)
    assert "group is v1 on prefill and v2 on decode (give each group endpoints of both roles)" in refusal.message


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"v2": 0.05}, {"v2": 20, "v1": 380}),
        ({"v1": 0.7, "v2": 0.3}, {"v1": 280, "v2": 120}),
        ({"v2": 1.0}, {"v2": 400}),
        ({"v2": 0.0}, {"v1": 400}),
    ],
)
def test_named_groups_get_their_share(
    shape: dict[str, Any], weights: dict[str, float], expected: dict[str, int]
) -> None:
    """The shares are exact to a few requests, whatever the load of the groups."""
    found = Pool(**shape, weights=weights).groups()

    assert {group: pytest.approx(count, abs=3) for group, count in expected.items()} == found


def test_unnamed_groups_share_the_rest_by_load() -> None:
    """It includes endpoints without a group."""
    pool = Pool(("a", "b", None, "c"), ("a", "b", None, "c"), weights={"c": 0.1})
    found = pool.groups()

    assert found["c"] == pytest.approx(40, abs=3)
    assert min(found["a"], found["b"]) > 40


def test_first_requests_of_many_replicas_have_the_shares_too() -> None:
    """Replicas do not all begin with the same group."""
    first = Counter(Pool(TWO, TWO, weights={"v2": 0.25}, seed=seed).group() for seed in range(200))

    assert 25 <= first["v2"] <= 75


def no_decode(pool: Pool, group: str) -> None:
    pool.fleet.load.update(
        [each for each in pool.fleet.load.endpoints if each.group != group or each.role is Role.PREFILL], 5.0
    )


def unreachable(pool: Pool, group: str) -> None:
    for each in pool.all_of(group, Role.DECODE, Role.WORKER):
        pool.fleet.load.failed(each.configured, GONE, pool.fleet.clock())


def ejected(pool: Pool, group: str) -> None:
    for each in pool.all_of(group, Role.DECODE, Role.WORKER):
        while not each.health.is_ejected(pool.fleet.clock()):
            each.health.failed(pool.fleet.clock())


def full(pool: Pool, group: str) -> None:
    """Fill every rank, so that one more request does not fit."""
    pool.configure({"v1": 0.5, "v2": 0.3}, AdmissionSettings(max_tokens=1000))
    for each in pool.all_of(group, Role.DECODE, Role.WORKER):
        for rank in range(len(each.ranks)):
            each.reserve(rank, 2000.0, pool.fleet.clock())


def too_small(pool: Pool, group: str) -> None:
    for each in pool.all_of(group, Role.DECODE, Role.WORKER):
        page = LoadPage(tuple(RankSample(rank, used_tokens=0, capacity_tokens=1, age=0.0) for rank in range(2)))
        pool.fleet.load.sampled(each.configured, page, pool.fleet.clock(), pool.fleet.clock())


OUTAGES = [no_decode, unreachable, ejected, full, too_small]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outage", OUTAGES)
def test_share_of_a_group_that_cannot_serve_goes_to_the_rest(
    shape: dict[str, Any], outage: Callable[[Pool, str], None]
) -> None:
    """No request is refused, and another named group gets no more than its own share."""
    shape = {key: (*groups, "v3") for key, groups in shape.items()}
    pool = Pool(**shape, weights={"v1": 0.5, "v2": 0.3})
    outage(pool, "v1")
    found = pool.groups()

    assert found["v1"] == 0
    if outage is not full:  # where the load decides what a full group cannot take
        assert found == {"v2": pytest.approx(120, abs=3), "v3": pytest.approx(280, abs=3)}


@pytest.mark.parametrize("outage", OUTAGES[:3])
def test_named_groups_get_everything_if_the_rest_cannot_serve(outage: Callable[[Pool, str], None]) -> None:
    """They get it in proportion, and one of no share only if it is the last."""
    pool = Pool((*TWO, "v3"), (*TWO, "v3"), weights={"v1": 0.2, "v2": 0.05, "v3": 0.0})
    assert pool.groups() == {"v1": pytest.approx(320, abs=3), "v2": pytest.approx(80, abs=3)}
    outage(pool, "v1")
    assert pool.groups(50) == {"v2": 50}
    outage(pool, "v2")
    assert pool.groups(50) == {"v3": 50}


def test_group_with_a_weight_need_not_exist() -> None:
    """The weight may be configured before the first endpoint of the group is there."""
    assert Pool(("v1",), ("v1",), weights={"v2": 0.05}).groups(50) == {"v1": 50}
    assert Pool((None,), (None,), weights={"v2": 1.0}).groups(50) == {None: 50}


@pytest.mark.parametrize("weights", [{}, {"v2": 0.5}])
def test_requests_stay_in_complete_groups_while_one_role_is_replaced_first(weights: dict[str, float]) -> None:
    """From v1 to v2, decode first: at no step is a request refused or paired across groups."""
    steps: list[tuple[Groups, Groups, set[str]]] = [
        (("v1", "v1"), ("v1", "v1", "v2"), {"v1"}),
        (("v1", "v1"), ("v1", "v2", "v2"), {"v1"}),
        (("v1", "v2"), ("v1", "v2", "v2"), {"v1", "v2"}),
        (("v1", "v2"), ("v2", "v2"), {"v2"}),
        (("v2", "v2"), ("v2", "v2"), {"v2"}),
    ]
    for prefills, decodes, expected in steps:
        assert {*Pool(prefills, decodes, weights=weights).groups(60)} == expected


@pytest.mark.parametrize("weights", [{}, {"v1": 0.1}, {"v2": 0.1}])
@pytest.mark.parametrize("group", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["disaggregated", "aggregated"])
def test_retry_stays_in_its_group(group: str, weights: dict[str, float], kind: str) -> None:
    """It leaves the group only if no other pair is left there."""
    four: Groups = ("v1", "v1", "v2", "v2")
    pool = Pool(four, four, weights=weights) if kind == "disaggregated" else Pool(workers=four, weights=weights)
    firsts = {each.role: each for each in reversed(pool.all_of(group))}
    failed = frozenset(each.address for each in firsts.values())
    assert pool.groups(40, failed=(failed,)) == {group: 40}

    everything = frozenset(each.address for each in pool.all_of(group))
    other = {"v1": "v2", "v2": "v1"}[group]
    assert pool.groups(40, failed=(everything,)) == {other: 40}
    assert pool.groups(40, failed=(everything, failed)) == {other: 40}


@pytest.mark.parametrize(
    ("weights", "expected"), [({}, "v1"), ({"v2": 0.1}, "v1"), ({"v2": 1.0}, "v1"), ({"v1": 0.0}, "v2")]
)
@pytest.mark.parametrize("kind", ["disaggregated", "aggregated"])
def test_retry_leaves_a_group_in_which_two_attempts_have_failed(
    weights: dict[str, float], expected: str, kind: str
) -> None:
    """All engines of a canary may fail, while those of the other revision work; but one of no share is no way out."""
    several: Groups = ("v1", "v2", "v2", "v2")
    pool = (
        Pool(several, several, weights=weights) if kind == "disaggregated" else Pool(workers=several, weights=weights)
    )
    roles = (Role.PREFILL, Role.DECODE, Role.WORKER)
    first, second, _ = zip(*(found for role in roles if (found := pool.all_of("v2", role))), strict=True)
    failed = tuple(frozenset(each.address for each in attempt) for attempt in (first, second))

    assert pool.groups(20, failed=failed[:1], session="one") == {"v2": 20}
    assert pool.groups(20, failed=failed, session="one") == {expected: 20}


def test_conversation_stays_in_one_group_and_moves_only_to_the_growing_one() -> None:
    """Its prefix cache is there. Another replica finds the same group."""
    pool, peer = Pool(TWO, TWO, weights={"v2": 0.05}), Pool(TWO, TWO, weights={"v2": 0.05}, seed=7)
    names = [f"conversation-{number}" for number in range(400)]
    few = {name for name in names if pool.group(session=name) == "v2"}
    assert 8 <= len(few) <= 40
    assert {name for name in names if peer.group(session=name) == "v2"} == few
    assert all({pool.group(session=name) for _ in range(5)} == {"v2"} for name in few)

    pool.configure({"v2": 0.5})
    half = {name for name in names if pool.group(session=name) == "v2"}
    assert 160 <= len(half) <= 240
    assert few <= half


def test_conversations_of_other_groups_stay_when_a_named_group_cannot_serve() -> None:
    """Only those of the group that is away move."""
    three = ("v1", "v2", "v3")
    pool = Pool(three, three, weights={"v1": 0.3, "v2": 0.3})
    names = [f"conversation-{number}" for number in range(60)]
    before = {name: pool.group(session=name) for name in names}
    assert {*before.values()} == {*three}
    no_decode(pool, "v1")
    assert {name: pool.group(session=name) for name in names} == {
        name: "v3" if group == "v1" else group for name, group in before.items()
    }


def test_weights_change_at_once() -> None:
    """A canary grows to all requests by reloads of the configuration."""
    pool = Pool(TWO, TWO)
    for weight in (0.05, 0.5, 1.0):
        pool.configure({"v2": weight})
        assert pool.groups(200)["v2"] == pytest.approx(200 * weight, abs=3)


def test_requests_of_each_group_are_counted() -> None:
    """A pool without groups has no counts."""
    pool = Pool(TWO, TWO, weights={"v2": 0.5})
    pool.groups(10)
    plain = Pool((None,), (None,))
    plain.groups(10)

    assert pool.fleet.scheduler.group_requests == {("*", "v1"): 5, ("*", "v2"): 5}
    assert not plain.fleet.scheduler.group_requests


some_groups = st.lists(st.sampled_from([None, "v1", "v2"]), min_size=1, max_size=3)
indices = st.sets(st.integers(0, 5))


@given(
    some_groups, some_groups, st.dictionaries(st.sampled_from(["v1", "v2", "v3"]), st.floats(0, 0.33)),
    indices, indices, st.lists(indices, max_size=2), st.integers(0, 2**32),
)  # fmt: skip
def test_no_outage_leads_to_a_refusal_while_some_pair_is_there(  # noqa: PLR0917 - one of each kind
    prefills: Groups,
    decodes: Groups,
    weights: dict[str, float],
    gone: set[int],
    sick: set[int],
    failed: list[set[int]],
    seed: int,
) -> None:
    """Whatever is unreachable, ejected or has failed, and whatever the weights: no pair crosses groups."""
    pool = Pool(prefills, decodes, weights=weights, seed=seed)
    endpoints = list(pool.fleet.load.by_url.values())
    for number, each in enumerate(endpoints):
        if number in gone:
            pool.fleet.load.failed(each.configured, GONE, pool.fleet.clock())
        if number in sick:
            for _ in range(3):
                each.health.failed(pool.fleet.clock())
    attempts = tuple(
        frozenset(each.address for number, each in enumerate(endpoints) if number in those) for those in failed
    )
    some_pair = any(one == other or None in {one, other} for one in prefills for other in decodes)
    for _ in range(3):
        if some_pair:
            pool.group(failed=attempts)
        else:
            assert isinstance(pool.schedule(failed=attempts), Rejection)
