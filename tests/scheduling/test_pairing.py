"""Endpoints that cannot be paired never get a request together, whatever has failed elsewhere."""

import json
from collections import Counter
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
from dp_extproc.engines.compatibility import Difference, PairingKey, difference
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import EngineFacts, LoadPage, PairTerms, RankSample, Role
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.matching import find_matches
from dp_extproc.request.body import InferenceRequest, read_body
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Decision, RequestContext, SchedulingResult
from dp_extproc.scheduling.filters import EndpointFilter, preferred
from dp_extproc.scheduling.pairing import best_pairing
from fleet_fixtures import Fleet, make_endpoint, make_facts

BODY = b'{"prompt":"hello"}'
GONE = EngineFailure(FailureKind.REFUSED, "no connection")
Sizes = Sequence[int | None]


def servers(role: Role, sizes: Sizes, version: tuple[int, int, int] = (0, 5, 23)) -> list[EngineFacts]:
    """Make endpoints with pages of these sizes; None for one that reports none."""
    return [replace(make_facts(role, version, ranks=2), terms=PairTerms(page_size=size)) for size in sizes]


def make_fleet(prefills: Sizes, decodes: Sizes, version: tuple[int, int, int] = (0, 5, 23), **more: Any) -> Fleet:
    return Fleet(
        prefills=servers(Role.PREFILL, prefills, version), decodes=servers(Role.DECODE, decodes, version), **more
    )


def place(fleet: Fleet, **context: Any) -> SchedulingResult:
    return fleet.scheduler.place(Api.COMPLETIONS, BODY, RequestContext(**context))


def numbers(fleet: Fleet, decision: SchedulingResult) -> tuple[int, int]:
    """Return the numbers of the prefill and the decode endpoint of a decision, each counted from 1."""
    assert isinstance(decision, Decision), decision
    headers = dict(decision.headers)
    by_address = {host.address.encode(): host for host in fleet.load.by_url.values()}
    prefill, decode = (by_address[headers[name]] for name in (contract.PREFILL_HOST, contract.DECODE_HOST))
    assert difference(prefill.pairing_key, decode.pairing_key) is None
    return number_of(prefill), number_of(decode)


def read_ids(tokens: int) -> InferenceRequest:
    """Read a request with a prompt of so many ids."""
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


def test_fleet_that_agrees_has_no_matches() -> None:
    """Such a pool costs no look-up, also where an engine reports no page size."""
    fleet = make_fleet([1, 1], [1, None])

    assert not fleet.load.matches
    assert find_matches([], fleet.load.known("*", Role.DECODE)) is None
    assert find_matches(fleet.load.known("*", Role.PREFILL), []) is None


def test_endpoints_are_paired_with_those_that_agree() -> None:
    """Each prefill endpoint gets requests, and so does each decode endpoint."""
    assert picks(make_fleet([1, 2], [1, 2])) == {(1, 1), (2, 2)}
    assert picks(make_fleet([1, 2, 2], [2, 1, 2])) == {(1, 2), (2, 1), (2, 3), (3, 1), (3, 3)}


def test_prefill_endpoint_without_a_partner_gets_no_request() -> None:
    """Its load does not matter."""
    fleet = make_fleet([1, 2], [2])
    fleet.sample(make_endpoint(Role.PREFILL, 2), [90_000, 90_000])

    assert picks(fleet) == {(2, 1)}


def test_endpoint_of_unknown_page_size_is_paired_with_all() -> None:
    """A pair that may work is not refused."""
    assert picks(make_fleet([1, None], [2, None])) == {(1, 2), (2, 1), (2, 2)}


@pytest.mark.parametrize("host", list(HostPolicy))
@pytest.mark.parametrize("rank", list(RankPolicy))
@pytest.mark.parametrize("version", [(0, 5, 5), (0, 5, 9), (0, 5, 10), (0, 5, 23)], ids=str)
def test_every_policy_and_rank_control_picks_a_pair_that_agrees(
    host: HostPolicy, rank: RankPolicy, version: tuple[int, int, int]
) -> None:
    """The rule holds also where a bootstrap room leads to both ranks."""
    fleet = make_fleet([1, 2, 1], [2, 1, 2], version, policy={"host": host, "dp_rank": rank})

    assert {(prefill % 2, decode % 2) for prefill, decode in picks(fleet)} == {(1, 0), (0, 1)}


@pytest.mark.parametrize("host", [HostPolicy.RANDOM, HostPolicy.ROUND_ROBIN, HostPolicy.POWER_OF_TWO])
def test_policy_without_costs_weights_groups_by_the_scarcer_role(host: HostPolicy) -> None:
    """Of 3 prefill and 1 decode engines of one kind, and 1 and 3 of the other, neither decode engine is flooded."""
    fleet = make_fleet([1, 1, 1, 2], [1, 2, 2, 2], policy=PolicySettings(host=host))
    served = Counter(numbers(fleet, place(fleet))[1] for _ in range(400))

    assert served[1] == pytest.approx(200, abs=60)
    assert served[2] + served[3] + served[4] == 400 - served[1]


def test_refusal_names_what_differs() -> None:
    """Its text has a remedy for the operator, and its reason is a reason of its own."""
    refusal = place(make_fleet([1, 64], [2]))

    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (503, Reason.NO_COMPATIBLE_PAIR)
    assert "page_size is 1 on prefill and 2 on decode (start both with the same --page-size)" in refusal.message
    assert "page_size is 64 on prefill and 2 on decode" in refusal.message
    assert json.loads(refusal.body())["error"]["code"] == "no_compatible_pair"


def test_ejected_partner_is_not_replaced_by_one_that_differs() -> None:
    """The other pair gets the requests. If all are ejected, a pair that agrees is tried all the same."""
    fleet = make_fleet([1, 2], [1, 2])
    eject(fleet, fleet.endpoint(Role.DECODE, 1))
    assert picks(fleet) == {(2, 2)}

    eject(fleet, fleet.endpoint(Role.DECODE, 2))
    assert picks(fleet) <= {(1, 1), (2, 2)}


def test_unreachable_partner_is_not_replaced_by_one_that_differs() -> None:
    """A fresh endpoint is preferred to a stale one only together with a partner."""
    fleet = make_fleet([1], [1, 2])
    fleet.load.failed(make_endpoint(Role.DECODE, 1), GONE, fleet.clock())

    assert picks(fleet) == {(1, 1)}


def test_retry_goes_to_a_pair_that_agrees() -> None:
    """It goes to another pair if there is one, and else to the same one again."""
    fleet = make_fleet([1, 2], [1, 2])
    first = frozenset({fleet.endpoint(Role.PREFILL, 1).address, fleet.endpoint(Role.DECODE, 1).address})
    second = frozenset({fleet.endpoint(Role.PREFILL, 2).address, fleet.endpoint(Role.DECODE, 2).address})

    assert {numbers(fleet, place(fleet, failed=(first,))) for _ in range(20)} == {(2, 2)}
    assert {numbers(fleet, place(fleet, failed=(second, first))) for _ in range(20)} == {(2, 2)}

    lone = make_fleet([1], [1, 2])
    assert numbers(lone, place(lone, failed=(first,))) == (1, 1)


def test_request_is_refused_if_the_subset_has_no_pair_that_agrees() -> None:
    """Decode endpoints outside of the subset are not used, even if they agree."""
    fleet = make_fleet([1], [1, 2])
    allowed = frozenset({fleet.endpoint(Role.DECODE, 2).address})
    refusal = place(fleet, subset=allowed)

    assert isinstance(refusal, Rejection)
    assert refusal.reason is Reason.NO_COMPATIBLE_PAIR
    assert numbers(fleet, place(fleet, subset=allowed | {fleet.endpoint(Role.DECODE, 1).address})) == (1, 1)


@pytest.mark.parametrize("sizes", [[1, 2], [1, 1]], ids=["grouped by what agrees", "all alike"])
def test_subset_limits_decode_endpoints_alone(sizes: list[int]) -> None:
    """A gateway names endpoints of its own pool, and prefill endpoints are in none."""
    fleet = make_fleet(sizes, sizes)
    allowed = frozenset({fleet.endpoint(Role.DECODE, 2).address})
    found = {numbers(fleet, place(fleet, subset=allowed)) for _ in range(30)}

    assert found == ({(2, 2)} if sizes == [1, 2] else {(1, 2), (2, 2)})


def test_pair_is_picked_that_has_room_on_both_legs() -> None:
    """A full decode endpoint sends the request to another pair; it is refused once all are full."""
    fleet = make_fleet([1, 2], [1, 2])
    limits = AdmissionSettings(max_token_ratio=None, max_request_ratio=None, max_requests=2)
    fleet.scheduler.configure([fleet.pool], LoadSignal.ESTIMATE, limits)
    placed = [place(fleet) for _ in range(8)]
    pairs = [numbers(fleet, each) for each in placed]
    refusal = place(fleet)

    assert (pairs.count((1, 1)), pairs.count((2, 2))) == (4, 4)
    assert isinstance(refusal, Rejection)
    assert refusal.reason is Reason.OVER_CAPACITY


def test_matches_change_when_an_engine_restarts_with_other_options() -> None:
    """The change takes effect in both directions."""
    fleet = make_fleet([1], [2])
    endpoint = make_endpoint(Role.DECODE)
    for size, expected in ((1, Decision), (2, Rejection)):
        (facts,) = servers(Role.DECODE, [size])
        fleet.load.discovered(endpoint, "10.0.0.1:32001", facts, fleet.clock())
        assert isinstance(place(fleet), expected)


def test_matches_change_when_an_endpoint_is_removed() -> None:
    """The matches are found anew on a reload."""
    fleet = make_fleet([1], [1, 2])
    assert fleet.load.matches
    fleet.load.update([each for each in fleet.endpoints if each != make_endpoint(Role.DECODE, 2)], 5.0)
    assert not fleet.load.matches


def test_large_fleet_has_one_match_per_kind() -> None:
    """Every endpoint is in the match of its kind."""
    fleet = make_fleet([1, 2] * 50, [2, 1] * 50)
    matches = find_matches(fleet.load.known("*", Role.PREFILL), fleet.load.known("*", Role.DECODE))

    assert matches is not None
    assert [(len(match.prefills), len(match.decodes)) for match in matches] == [(50, 50), (50, 50)]


sizes = st.lists(st.sampled_from([None, 1, 2]), min_size=1, max_size=3)
some_hosts = st.sets(st.integers(0, 5))


@given(sizes, sizes, some_hosts, some_hosts, st.lists(some_hosts, max_size=3), st.integers(0, 2**32))
def test_no_failure_leads_to_a_pair_that_differs(  # noqa: PLR0917 - one of each kind of trouble
    prefills: Sizes,
    decodes: Sizes,
    gone: set[int],
    ejected: set[int],
    failed: list[set[int]],
    seed: int,
) -> None:
    """Whatever is unreachable, ejected or has failed: a pair that agrees is picked if there is one, and no other."""
    fleet = make_fleet(prefills, decodes, seed=seed)
    hosts = list(fleet.load.by_url.values())

    def those(indices: Iterable[int]) -> list[EndpointLoad]:
        return [hosts[index] for index in indices if index < len(hosts)]

    for host in those(gone):
        fleet.load.failed(host.configured, GONE, fleet.clock())
    eject(fleet, *those(ejected))
    attempts = tuple(frozenset(host.address for host in those(attempt)) for attempt in failed)
    can_be_placed = any(
        difference(one.pairing_key, other.pairing_key) is None
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
    """Make 100 endpoints of each role, so many of which have larger pages."""
    sizes = [1] * (100 - differing) + [2] * differing
    return make_fleet(sizes, sizes)


class Walked(list[EndpointLoad]):
    """Counts how often it is walked."""

    walks = 0

    def __iter__(self) -> Iterator[EndpointLoad]:
        Walked.walks += 1
        return super().__iter__()


@pytest.mark.parametrize("differing", [1, 50])
def test_endpoint_is_asked_about_once_whatever_its_partners(differing: int) -> None:
    """Otherwise a decision would cost the product of both roles, and a full fleet would block everything."""
    fleet = in_large_pool(differing)
    pairing = best_pairing(fleet.load, "*", read_ids(1), RequestContext(), fleet.clock())
    assert pairing is not None
    asked: list[EndpointLoad] = []

    def wanted(host: EndpointLoad) -> bool:
        asked.append(host)
        return host not in {fleet.endpoint(Role.PREFILL, 1), fleet.endpoint(Role.DECODE, 2)}

    left = pairing.only(wanted)
    assert left is not None
    assert len(asked) == len({*asked}) == 200
    assert (len(left.prefills), len(left.decodes)) == (99, 99)
    for prefill in left.prefills:
        expected = [other for other in left.decodes if difference(prefill.pairing_key, other.pairing_key) is None]
        assert left.decodes_of(prefill) == expected


def test_decode_endpoints_of_a_match_are_walked_as_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """All prefill endpoints of a match share it, so the number of walks follows from the matches alone."""
    fleet = in_large_pool()

    def prefer_walked(*args: Any) -> tuple[int, Walked]:
        level, chosen = preferred(*args)
        return level, Walked(chosen)

    monkeypatch.setattr("dp_extproc.scheduling.pairing.preferred", prefer_walked)
    Walked.walks = 0
    pairing = best_pairing(fleet.load, "*", read_ids(1), RequestContext(), fleet.clock())

    assert pairing is not None
    assert (len(pairing.prefills), len(pairing.decodes)) == (100, 100)
    assert Walked.walks <= 16, "two matches of two lists, each walked a few times"


def test_differences_in_a_large_fleet_are_found_by_its_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal has to be as cheap as a decision."""
    compared = []

    def counted(prefill: PairingKey, decode: PairingKey) -> Difference | None:
        compared.append((prefill, decode))
        return difference(prefill, decode)

    fleet = make_fleet([1, 64] * 50, [2] * 100)
    monkeypatch.setattr(compatibility, "difference", counted)
    refusal = place(fleet)

    assert isinstance(refusal, Rejection)
    assert "page_size is 64 on prefill and 2 on decode" in refusal.message
    assert len(compared) == 2


class OfSizes:
    """Two pairs that cannot be mixed, with KV caches of so many tokens; None for one of unknown size."""

    def __init__(self, prefills: Sizes, decodes: Sizes) -> None:
        self.fleet = make_fleet([1, 2], [1, 2])
        for role, sizes in ((Role.PREFILL, prefills), (Role.DECODE, decodes)):
            for number, size in enumerate(sizes, start=1):
                self.resize(role, number, size)

    def resize(self, role: Role, number: int, size: int | None) -> None:
        page = LoadPage(tuple(RankSample(rank, used_tokens=0, capacity_tokens=size, age=0.0) for rank in range(2)))
        self.fleet.load.sampled(make_endpoint(role, number), page, self.fleet.clock(), self.fleet.clock())

    def place(self, body: dict[str, Any], **context: Any) -> SchedulingResult:
        found = self.fleet.scheduler.place(Api.GENERATE, json.dumps(body).encode(), RequestContext(**context))
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
def test_prompt_goes_to_endpoints_that_can_hold_it(
    prefills: Sizes, decodes: Sizes, body: dict[str, Any], expected: set[tuple[int, int]]
) -> None:
    """The load of the others does not matter, as the prompt would never run there."""
    sizes = OfSizes(prefills, decodes)
    # What a prompt begins with would keep it where it was first, and lockstep would prefer a cache with more room.
    policy = PolicySettings(host=HostPolicy.RANDOM, affinity=AffinitySettings(prefixes=False))
    sizes.fleet.scheduler.configure(
        [sizes.fleet.pool.model_copy(update={"policy": policy})],
        LoadSignal.ESTIMATE,
        AdmissionSettings(),
    )
    assert sizes.pairs(body) == expected


def test_prompt_that_no_pair_can_hold_is_refused_with_400() -> None:
    """The largest capacity counts, or the one that rules out every pair."""
    for prefills, decodes, largest in (
        ((None, None), (1000, 2000), "largest decode rank that it can go to holds 2000"),
        ((3000, 1000), (9000, 9000), "largest prefill rank that it can go to holds 3000"),
        ((1000, 9000), (9000, 1000), "rank that it can go to holds 1000"),
    ):
        refusal = OfSizes(prefills, decodes).place(LONG)
        assert isinstance(refusal, Rejection), refusal
        assert (refusal.status, refusal.reason) == (400, Reason.PROMPT_TOO_LONG)
        assert largest in refusal.message


def test_long_prompt_prefers_unhealthy_endpoints_to_small_ones() -> None:
    """Ejected or failed ones may work again, while the others can never hold it; an estimate is not as certain."""
    sizes = OfSizes((None, None), (1000, 10_000))
    failed = frozenset({sizes.fleet.endpoint(Role.DECODE, 2).address})
    assert numbers(sizes.fleet, sizes.place(LONG, failed=(failed,))) == (2, 2)
    eject(sizes.fleet, sizes.fleet.endpoint(Role.DECODE, 2))

    assert sizes.pairs(LONG) == {(2, 2)}
    assert sizes.pairs({"text": "x" * 10_000}) == {(1, 1)}


def test_refusal_for_want_of_a_pair_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the usable endpoints agree, it names what differs among all, or that nothing does."""
    fleet = make_fleet([1, 2], [1, 2])
    capable = EndpointFilter.capable

    def first_alone(filters: EndpointFilter, *args: Any, **options: Any) -> Sequence[EndpointLoad]:
        return capable(filters, *args, **options)[:1]

    monkeypatch.setattr(EndpointFilter, "capable", first_alone)
    monkeypatch.setattr("dp_extproc.scheduling.pairing.best_pairing", lambda *_: None)
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
