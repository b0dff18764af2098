"""Servers that must not meet are never paired, whatever is wrong with the others."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc import contract
from dp_extproc.config.load import LoadSignal
from dp_extproc.config.pools import AffinitySettings, HostPolicy, PolicySettings, RankPolicy
from dp_extproc.config.reliability import AdmissionSettings
from dp_extproc.engines import compatibility
from dp_extproc.engines.compatibility import Difference, difference
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import EngineFacts, LoadPage, PairTerms, RankSample, Role
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.health import choose
from dp_extproc.load.matching import find_matches
from dp_extproc.request.body import InferenceRequest, read_body
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Decision, RequestContext, SchedulingResult
from dp_extproc.scheduling.sides import matching_sides
from fleet_fixtures import Fleet, make_endpoint, make_facts

BODY = b'{"prompt":"hello"}'
GONE = EngineFailure(FailureKind.REFUSED, "no connection")
Sizes = Sequence[int | None]


def servers(role: Role, sizes: Sizes, version: tuple[int, int, int] = (0, 5, 23)) -> list[EngineFacts]:
    """Give servers with pages of these sizes; None for one that does not tell."""
    return [replace(make_facts(role, version, ranks=2), terms=PairTerms(page_size=size)) for size in sizes]


def make_fleet(prefills: Sizes, decodes: Sizes, version: tuple[int, int, int] = (0, 5, 23), **more: Any) -> Fleet:
    return Fleet(
        prefills=servers(Role.PREFILL, prefills, version), decodes=servers(Role.DECODE, decodes, version), **more
    )


def place(fleet: Fleet, **context: Any) -> SchedulingResult:
    return fleet.dispatcher.place(Api.COMPLETIONS, BODY, RequestContext(**context))


def numbers(fleet: Fleet, decision: SchedulingResult) -> tuple[int, int]:
    """Tell which prefill and which decode server a request goes to, each counted from 1."""
    assert isinstance(decision, Decision), decision
    headers = dict(decision.headers)
    by_address = {host.address.encode(): host for host in fleet.load.by_url.values()}
    prefill, decode = (by_address[headers[name]] for name in (contract.PREFILL_HOST, contract.DECODE_HOST))
    assert difference(prefill.facts, decode.facts) is None
    return number_of(prefill), number_of(decode)


def read_ids(tokens: int) -> InferenceRequest:
    """Give a request with a prompt of so many ids."""
    request = read_body(Api.GENERATE, json.dumps({"input_ids": [1] * tokens}).encode())
    assert isinstance(request, InferenceRequest)
    return request


def number_of(host: EndpointLoad) -> int:
    return int(host.configured.host.rpartition(".")[2])


def eject(fleet: Fleet, *hosts: EndpointLoad) -> None:
    for host in hosts:
        while not host.health.is_ejected(fleet.clock()):
            host.health.failed(fleet.clock())


def picks(fleet: Fleet, requests: int = 100) -> set[tuple[int, int]]:
    return {numbers(fleet, place(fleet)) for _ in range(requests)}


def test_a_fleet_that_agrees_is_not_sorted() -> None:
    """Nothing is looked up for its requests, also where some server does not tell."""
    fleet = make_fleet([1, 1], [1, None])

    assert not fleet.load.matches
    assert find_matches([], fleet.load.known("*", Role.DECODE)) is None
    assert find_matches(fleet.load.known("*", Role.PREFILL), []) is None


def test_servers_are_paired_with_those_that_agree() -> None:
    """Each prefill server has work, and so has each decode server."""
    assert picks(make_fleet([1, 2], [1, 2])) == {(1, 1), (2, 2)}
    assert picks(make_fleet([1, 2, 2], [2, 1, 2])) == {(1, 2), (2, 1), (2, 3), (3, 1), (3, 3)}


def test_a_prefill_server_without_a_partner_is_left_alone() -> None:
    """However idle it is."""
    fleet = make_fleet([1, 2], [2])
    fleet.sample(make_endpoint(Role.PREFILL, 2), [90_000, 90_000])

    assert picks(fleet) == {(2, 1)}


def test_who_does_not_tell_is_paired_with_everybody() -> None:
    """A pair that may work is not refused."""
    assert picks(make_fleet([1, None], [2, None])) == {(1, 2), (2, 1), (2, 2)}


@pytest.mark.parametrize("host", list(HostPolicy))
@pytest.mark.parametrize("rank", list(RankPolicy))
@pytest.mark.parametrize("version", [(0, 5, 5), (0, 5, 9), (0, 5, 10), (0, 5, 23)], ids=str)
def test_every_policy_and_rank_control_keeps_to_it(
    host: HostPolicy, rank: RankPolicy, version: tuple[int, int, int]
) -> None:
    """Also where a room leads to both ranks."""
    fleet = make_fleet([1, 2, 1], [2, 1, 2], version, policy={"host": host, "dp_rank": rank})

    assert {(prefill % 2, decode % 2) for prefill, decode in picks(fleet)} == {(1, 0), (0, 1)}


def test_the_refusal_names_what_differs() -> None:
    """In words that an operator can act on, and with a reason of its own."""
    refusal = place(make_fleet([1, 64], [2]))

    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (503, Reason.NO_COMPATIBLE_PAIR)
    assert "page_size is 1 on prefill and 2 on decode (start both with the same --page-size)" in refusal.message
    assert "page_size is 64 on prefill and 2 on decode" in refusal.message
    assert json.loads(refusal.body())["error"]["code"] == "no_compatible_pair"


def test_a_partner_that_is_ejected_is_not_replaced_by_one_that_differs() -> None:
    """The other pair has the work; when all are ejected a pair that agrees is tried all the same."""
    fleet = make_fleet([1, 2], [1, 2])
    eject(fleet, fleet.host(Role.DECODE, 1))
    assert picks(fleet) == {(2, 2)}

    eject(fleet, fleet.host(Role.DECODE, 2))
    assert picks(fleet) <= {(1, 1), (2, 2)}


def test_a_partner_that_is_gone_is_not_replaced_by_one_that_differs() -> None:
    """Whoever is fresh counts more than who is stale, but only together with a partner."""
    fleet = make_fleet([1], [1, 2])
    fleet.load.failed(make_endpoint(Role.DECODE, 1), GONE, fleet.clock())

    assert picks(fleet) == {(1, 1)}


def test_a_retry_stays_with_servers_that_agree() -> None:
    """It goes to another pair if there is one, else to the same one again."""
    fleet = make_fleet([1, 2], [1, 2])
    first = frozenset({fleet.host(Role.PREFILL, 1).address, fleet.host(Role.DECODE, 1).address})
    second = frozenset({fleet.host(Role.PREFILL, 2).address, fleet.host(Role.DECODE, 2).address})

    assert {numbers(fleet, place(fleet, failed=(first,))) for _ in range(20)} == {(2, 2)}
    assert {numbers(fleet, place(fleet, failed=(second, first))) for _ in range(20)} == {(2, 2)}

    lone = make_fleet([1], [1, 2])
    assert numbers(lone, place(lone, failed=(first,))) == (1, 1)


def test_a_gateway_that_allows_only_servers_that_differ_is_refused() -> None:
    """What it forbids is not used, whoever would agree."""
    fleet = make_fleet([1, 2], [1, 2])
    allowed = frozenset({fleet.host(Role.PREFILL, 1).address, fleet.host(Role.DECODE, 2).address})
    refusal = place(fleet, subset=allowed)

    assert isinstance(refusal, Rejection)
    assert refusal.reason is Reason.NO_COMPATIBLE_PAIR
    assert numbers(fleet, place(fleet, subset=allowed | {fleet.host(Role.DECODE, 1).address})) == (1, 1)


def test_a_pair_is_picked_that_has_room_on_both_sides() -> None:
    """A full decode server sends the request to another pair; it is refused for room once all are full."""
    fleet = make_fleet([1, 2], [1, 2])
    limits = AdmissionSettings(max_token_ratio=None, max_request_ratio=None, max_requests=2)
    fleet.dispatcher.configure([fleet.pool], LoadSignal.ESTIMATE, limits)
    placed = [place(fleet) for _ in range(8)]
    pairs = [numbers(fleet, each) for each in placed]
    refusal = place(fleet)

    assert (pairs.count((1, 1)), pairs.count((2, 2))) == (4, 4)
    assert isinstance(refusal, Rejection)
    assert refusal.reason is Reason.OVER_CAPACITY


def test_an_engine_that_comes_back_with_other_options_is_sorted_anew() -> None:
    """In both directions."""
    fleet = make_fleet([1], [2])
    endpoint = make_endpoint(Role.DECODE)
    for size, expected in ((1, Decision), (2, Rejection)):
        (facts,) = servers(Role.DECODE, [size])
        fleet.load.discovered(endpoint, "10.0.0.1:32001", facts, fleet.clock())
        assert isinstance(place(fleet), expected)


def test_a_server_that_is_configured_no_more_counts_no_more() -> None:
    """The pool is sorted anew on a reload."""
    fleet = make_fleet([1], [1, 2])
    assert fleet.load.matches
    fleet.load.update([each for each in fleet.endpoints if each != make_endpoint(Role.DECODE, 2)], 5.0)
    assert not fleet.load.matches


def test_a_large_fleet_has_few_kinds() -> None:
    """Every server is in the match of its kind."""
    fleet = make_fleet([1, 2] * 50, [2, 1] * 50)
    matches = find_matches(fleet.load.known("*", Role.PREFILL), fleet.load.known("*", Role.DECODE))

    assert matches is not None
    assert [(len(match.prefills), len(match.decodes)) for match in matches] == [(50, 50), (50, 50)]


sizes = st.lists(st.sampled_from([None, 1, 2]), min_size=1, max_size=3)
some_hosts = st.sets(st.integers(0, 5))


@given(sizes, sizes, some_hosts, some_hosts, st.lists(some_hosts, max_size=3), st.integers(0, 2**32))
def test_no_trouble_leads_to_a_pair_that_differs(  # noqa: PLR0917 - one of each kind of trouble
    prefills: Sizes,
    decodes: Sizes,
    gone: set[int],
    ejected: set[int],
    failed: list[set[int]],
    seed: int,
) -> None:
    """Whoever is gone, ejected or has failed: a pair that agrees is placed if there is one, and none that does not."""
    fleet = make_fleet(prefills, decodes, seed=seed)
    hosts = list(fleet.load.by_url.values())

    def those(indices: Iterable[int]) -> list[EndpointLoad]:
        return [hosts[index] for index in indices if index < len(hosts)]

    for host in those(gone):
        fleet.load.failed(host.configured, GONE, fleet.clock())
    eject(fleet, *those(ejected))
    attempts = tuple(frozenset(host.address for host in those(attempt)) for attempt in failed)
    can_be_placed = any(
        difference(one.facts, other.facts) is None
        for one in fleet.load.known("*", Role.PREFILL)
        for other in fleet.load.known("*", Role.DECODE)
    )
    for _ in range(3):
        found = place(fleet, failed=attempts)
        if can_be_placed:
            numbers(fleet, found)
        else:
            assert isinstance(found, Rejection)
            assert found.reason is Reason.NO_COMPATIBLE_PAIR


def in_large_pool(differing: int = 1) -> Fleet:
    """Of 100 servers on each side so many have larger pages."""
    sizes = [1] * (100 - differing) + [2] * differing
    return make_fleet(sizes, sizes)


class Walked(list[EndpointLoad]):
    """Counts how often it is walked."""

    walks = 0

    def __iter__(self) -> Iterator[EndpointLoad]:
        Walked.walks += 1
        return super().__iter__()


@pytest.mark.parametrize("differing", [1, 50])
def test_a_server_is_asked_about_once_however_many_it_can_be_paired_with(differing: int) -> None:
    """Else a decision costs prefill servers times decode servers, and a fleet that is full blocks everything."""
    fleet = in_large_pool(differing)
    sides = matching_sides(fleet.load, "*", read_ids(1), fleet.clock(), RequestContext())
    assert sides is not None
    asked: list[EndpointLoad] = []

    def wanted(host: EndpointLoad) -> bool:
        asked.append(host)
        return host not in {fleet.host(Role.PREFILL, 1), fleet.host(Role.DECODE, 2)}

    left = sides.only(wanted)
    assert left is not None
    assert len(asked) == len({*asked}) == 200
    assert (len(left.prefills), len(left.decodes)) == (99, 99)
    for prefill in left.prefills:
        expected = [other for other in left.decodes if difference(prefill.facts, other.facts) is None]
        assert left.decodes_of(prefill) == expected


def test_the_decode_servers_of_a_match_are_walked_as_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """All prefill servers of a match share it, so the number of walks follows from the matches alone."""
    fleet = in_large_pool()
    monkeypatch.setattr("dp_extproc.scheduling.sides.choose", lambda *args: Walked(choose(*args)))
    Walked.walks = 0
    sides = matching_sides(fleet.load, "*", read_ids(1), fleet.clock(), RequestContext())

    assert sides is not None
    assert (len(sides.prefills), len(sides.decodes)) == (100, 100)
    assert Walked.walks <= 16, "two matches of two lists, each walked a few times"


def test_what_differs_in_a_large_fleet_is_found_by_its_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is a decision, too."""
    compared = []

    def counted(prefill: EngineFacts, decode: EngineFacts) -> Difference | None:
        compared.append((prefill, decode))
        return difference(prefill, decode)

    fleet = make_fleet([1, 64] * 50, [2] * 100)
    monkeypatch.setattr(compatibility, "difference", counted)
    refusal = place(fleet)

    assert isinstance(refusal, Rejection)
    assert "page_size is 64 on prefill and 2 on decode" in refusal.message
    assert len(compared) == 2


class OfSizes:
    """Two pairs that must not be mixed, with KV caches of so many tokens; None for one that does not tell."""

    def __init__(self, prefills: Sizes, decodes: Sizes) -> None:
        self.fleet = make_fleet([1, 2], [1, 2])
        for role, sizes in ((Role.PREFILL, prefills), (Role.DECODE, decodes)):
            for number, size in enumerate(sizes, start=1):
                self.resize(role, number, size)

    def resize(self, role: Role, number: int, size: int | None) -> None:
        page = LoadPage(tuple(RankSample(rank, used_tokens=0, capacity_tokens=size, age=0.0) for rank in range(2)))
        self.fleet.load.sampled(make_endpoint(role, number), page, self.fleet.clock(), self.fleet.clock())

    def place(self, body: dict[str, Any], **context: Any) -> SchedulingResult:
        found = self.fleet.dispatcher.place(Api.GENERATE, json.dumps(body).encode(), RequestContext(**context))
        if isinstance(found, Decision):
            assert found.in_flight is not None
            found.in_flight.end(self.fleet.clock())
        return found

    def pairs(self, body: dict[str, Any]) -> set[tuple[int, int]]:
        return {numbers(self.fleet, self.place(body)) for _ in range(40)}


LONG = {"input_ids": [1] * 5000}
BOTH = {(1, 1), (2, 2)}


@pytest.mark.parametrize(
    ("prefills", "decodes", "body", "expected"),
    [
        pytest.param((None, None), (1000, 10_000), LONG, {(2, 2)}, id="decode"),
        pytest.param((1000, 10_000), (None, None), LONG, {(2, 2)}, id="prefill"),
        pytest.param((None, None), (1000, None), LONG, {(2, 2)}, id="one-does-not-tell"),
        pytest.param((None, None), (1000, 10_000), {"text": "x" * 24_000}, {(2, 2)}, id="text-beyond-doubt"),
        pytest.param((None, None), (1000, 10_000), {"text": "x" * 10_000}, {(2, 2)}, id="text-by-estimate"),
        pytest.param((None, None), (5000, 10_000), LONG, BOTH, id="fits-both"),
        pytest.param((None, None), (1000, 10_000), {"text": [f"{n}" + "x" * 3000 for n in range(8)]}, BOTH, id="batch"),
    ],
)
def test_a_prompt_goes_to_servers_that_can_hold_it(
    prefills: Sizes, decodes: Sizes, body: dict[str, Any], expected: set[tuple[int, int]]
) -> None:
    """However idle the others are: there it would never be served."""
    sizes = OfSizes(prefills, decodes)
    # What a prompt begins with would keep it where it was first.
    sizes.fleet.dispatcher.configure(
        [sizes.fleet.pool.model_copy(update={"policy": PolicySettings(affinity=AffinitySettings(prefixes=False))})],
        LoadSignal.ESTIMATE,
        AdmissionSettings(),
    )
    assert sizes.pairs(body) == expected


def test_a_prompt_that_no_pair_can_hold_is_refused_for_good() -> None:
    """The largest counts, or that which stands in the way of every pair."""
    for prefills, decodes, largest in (
        ((None, None), (1000, 2000), "largest decode rank that it can go to holds 2000"),
        ((3000, 1000), (9000, 9000), "largest prefill rank that it can go to holds 3000"),
        ((1000, 9000), (9000, 1000), "rank that it can go to holds 1000"),
    ):
        refusal = OfSizes(prefills, decodes).place(LONG)
        assert isinstance(refusal, Rejection), refusal
        assert (refusal.status, refusal.reason) == (400, Reason.PROMPT_TOO_LONG)
        assert largest in refusal.message


def test_a_long_prompt_is_tried_on_servers_that_may_do_by_now() -> None:
    """Those that are ejected or have failed it, as the sound ones can never hold it; an estimate is not as certain."""
    sizes = OfSizes((None, None), (1000, 10_000))
    failed = frozenset({sizes.fleet.host(Role.DECODE, 2).address})
    assert numbers(sizes.fleet, sizes.place(LONG, failed=(failed,))) == (2, 2)
    eject(sizes.fleet, sizes.fleet.host(Role.DECODE, 2))

    assert sizes.pairs(LONG) == {(2, 2)}
    assert sizes.pairs({"text": "x" * 10_000}) == {(1, 1)}


def test_a_refusal_for_want_of_a_pair_never_lacks_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are left may agree: then it tells what differs among all, or that nothing does."""
    fleet = make_fleet([1, 2], [1, 2])
    capable = LoadCache.capable

    def first_alone(load: LoadCache, pool: str, role: Role, api: Api, now: float) -> Sequence[EndpointLoad]:
        return capable(load, pool, role, api, now)[:1]

    monkeypatch.setattr(LoadCache, "capable", first_alone)
    monkeypatch.setattr("dp_extproc.scheduling.scheduler.matching_sides", lambda *_: None)
    refusal = place(fleet)
    assert isinstance(refusal, Rejection)
    assert refusal.message.endswith("page_size is 2 on prefill and 1 on decode (start both with the same --page-size)")

    fleet = make_fleet([1], [1])
    fleet.load.matches["*"] = ()
    refusal = place(fleet)
    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (503, Reason.NO_COMPATIBLE_PAIR)
    assert refusal.message.endswith(
        "all of them agree, but no two of them can serve this request now; try again shortly"
    )
