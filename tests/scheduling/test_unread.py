"""Requests whose body is not read are placed by their headers, estimated by their length, or refused."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from dp_extproc import contract
from dp_extproc.engines.model import EngineFacts, Role
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Decision, RequestContext
from fleet_fixtures import Fleet, make_endpoint, make_facts

POLICY = {"affinity": {"prefixes": False}}
RANK, ROOM = f"{contract.OVERRIDE_PREFIX}routed-dp-rank", f"{contract.OVERRIDE_PREFIX}bootstrap-room"


def facts(role: Role, version: tuple[int, int, int] = (0, 5, 23), **more: Any) -> EngineFacts:
    return replace(make_facts(role, version), **{"reads_overrides": True, **more})


def make_fleet(
    prefills: Sequence[EngineFacts] = (facts(Role.PREFILL),), decodes: Sequence[EngineFacts] = (facts(Role.DECODE),)
) -> Fleet:
    return Fleet(prefills=prefills, decodes=decodes, policy=POLICY, routing_fields="headers")


def place(fleet: Fleet, length: int | None = 400, api: Api = Api.CHAT, **circumstances: Any) -> Decision:
    decision = fleet.scheduler.place_unread(api, length, RequestContext(**circumstances))
    assert isinstance(decision, Decision), decision
    return decision


def test_headers_have_all_routing_fields() -> None:
    """They have the least loaded ranks and a room that agrees; whether the response streams is unknown."""
    fleet = make_fleet()
    fleet.sample(make_endpoint(Role.PREFILL), [9, 9, 9, 1])
    fleet.sample(make_endpoint(Role.DECODE), [9, 1, 9, 9])
    decision = place(fleet)
    headers = dict(decision.headers)

    assert decision.body is None
    assert decision.streaming is None
    assert decision.merges is None
    assert (headers[contract.PREFILL_RANK], headers[RANK]) == (b"3", b"1")
    assert headers[f"{contract.OVERRIDE_PREFIX}disagg-prefill-dp-rank"] == b"3"
    assert int(headers[ROOM]) % 4 == 3
    assert (headers[contract.PREFILL_HOST], headers[contract.DECODE_HOST]) == (b"10.0.0.1:31001", b"10.0.0.1:32001")


def test_rank_is_in_headers_also_if_there_is_only_one() -> None:
    """Otherwise a rank in the body of a client would count."""
    fleet = make_fleet([facts(Role.PREFILL, dp_ranks=1)], [facts(Role.DECODE, dp_ranks=1)])
    headers = dict(place(fleet).headers)

    assert (headers[contract.PREFILL_RANK], headers[RANK]) == (b"0", b"0")


@pytest.mark.parametrize(("length", "tokens"), [(0, 1), (400, 100), (40_000, 10_000), (None, 1024)])
def test_tokens_are_estimated_by_the_length(length: int | None, tokens: int) -> None:
    """The whole body counts as prompt; one of unknown length counts as an ordinary prompt."""
    fleet = make_fleet()
    place(fleet, length)

    (reservation,) = [each for rank in fleet.endpoint(Role.PREFILL).ranks for each in rank.open]
    assert reservation.tokens == tokens


def test_estimate_follows_the_counts_of_engines() -> None:
    """The counts are compared with whole bodies, so the estimate learns what of them is no prompt."""
    fleet = make_fleet()
    ratio, url = fleet.load.ratios["*"], make_endpoint(Role.PREFILL).url
    for second in range(10):
        ratio.counted(url, 0, second)
    decision = place(fleet, 1 << 20)
    assert decision.in_flight is not None
    decision.in_flight.prefill_answered(200, fleet.clock())
    for second in range(10, 20):
        ratio.counted(url, 1 << 17, second)

    assert 7 < ratio.bytes_per_token <= 8


def test_prompt_is_not_refused_by_its_length_alone() -> None:
    """An image has many bytes and few tokens."""
    fleet = make_fleet()
    for endpoint in fleet.endpoints:
        fleet.sample(endpoint, [0] * 4)
    sample = fleet.endpoint(Role.PREFILL).ranks[0].sample
    assert sample is not None
    for role in (Role.PREFILL, Role.DECODE):
        for rank in fleet.endpoint(role).ranks:
            rank.sample = replace(sample, dp_rank=rank.index, capacity_tokens=1000)

    assert place(fleet, 1 << 20).in_flight is not None


def test_retry_goes_to_another_pair() -> None:
    """Retry avoidance needs no body."""
    fleet = make_fleet([facts(Role.PREFILL)] * 2, [facts(Role.DECODE)] * 2)
    first = dict(place(fleet).headers)
    failed = frozenset({first[contract.PREFILL_HOST].decode(), first[contract.DECODE_HOST].decode()})
    second = dict(place(fleet, failed=(failed,)).headers)

    assert {second[contract.PREFILL_HOST].decode(), second[contract.DECODE_HOST].decode()}.isdisjoint(failed)


def test_only_engines_that_read_the_headers_get_requests() -> None:
    """An engine that does not, or of which it is unknown, gets no request."""
    mixed = [facts(Role.DECODE, reads_overrides=False), facts(Role.DECODE, reads_overrides=None), facts(Role.DECODE)]
    fleet = make_fleet(decodes=mixed)

    hosts = {dict(place(fleet).headers)[contract.DECODE_HOST] for _ in range(20)}
    assert hosts == {b"10.0.0.3:32003"}


@pytest.mark.parametrize(
    ("api", "prefill", "status", "reason"),
    [
        pytest.param(Api.COMPLETIONS, {}, 400, Reason.CANNOT_CARRY_ROUTING, id="a path that reads no headers"),
        pytest.param(Api.RESPONSES, {}, 400, Reason.CANNOT_CARRY_ROUTING, id="another"),
        pytest.param(Api.CHAT, {"version": (0, 5, 17)}, 400, Reason.ENGINE_TOO_OLD, id="too old for chat"),
        pytest.param(Api.CHAT, {"reads_overrides": False}, 503, Reason.NO_ENDPOINTS, id="not told to read them"),
        pytest.param(Api.CHAT, {"reads_overrides": None}, 503, Reason.NO_ENDPOINTS, id="not known yet"),
    ],
)
def test_request_that_headers_cannot_route_is_refused(
    api: Api, prefill: dict[str, Any], status: int, reason: Reason
) -> None:
    """There is no body that could have the routing fields, so the refusal has the reason."""
    refusal = make_fleet([facts(Role.PREFILL, **prefill)]).scheduler.place_unread(api, 10)

    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (status, reason)


@pytest.mark.parametrize(
    ("routing_fields", "policy"),
    [
        ("body", POLICY),
        ("headers", {}),
        ("headers", {**POLICY, "dp_rank": "none"}),
        ("headers", {**POLICY, "client_dp_rank": "honour"}),
    ],
)
def test_request_is_refused_if_the_pool_needs_bodies(routing_fields: str, policy: dict[str, Any]) -> None:
    """An Envoy that sends no bodies, against the configuration, gets the reason; no request is placed by guess."""
    fleet = Fleet(
        prefills=[facts(Role.PREFILL)], decodes=[facts(Role.DECODE)], policy=policy, routing_fields=routing_fields
    )
    refusal = fleet.scheduler.place_unread(Api.CHAT, 10)

    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (500, Reason.UNSUPPORTED_BODY_MODE)


def test_aggregated_pool_needs_bodies() -> None:
    """The rank of an aggregated endpoint stands in the body."""
    fleet = Fleet(workers=[make_facts(Role.WORKER)], policy=POLICY)
    refusal = fleet.scheduler.place_unread(Api.CHAT, 10)

    assert isinstance(refusal, Rejection)
    assert refusal.reason is Reason.UNSUPPORTED_BODY_MODE
