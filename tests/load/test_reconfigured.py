"""Endpoints and policies that change while requests are in flight."""

import json
from dataclasses import replace

from dp_extproc.config import AdmissionSettings, LoadSignal, PoolConfig
from dp_extproc.engines.credentials import Credentials
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, LoadPage, Role
from dp_extproc.load.endpoint import DEFAULT_HEALTH
from dp_extproc.observability.metrics import Telemetry
from dp_extproc.prefix_cache.blocks import prefix_of
from dp_extproc.request.body import InferenceRequest, read_body
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Rejection
from dp_extproc.scheduling.decision import Decision
from fleet_fixtures import Fleet, address_of, make_endpoint, make_facts

WORKER = make_facts(Role.WORKER)
BODY = json.dumps({"text": "x" * 400}).encode()


def place(fleet: Fleet) -> Decision:
    decision = fleet.scheduler.place(Api.GENERATE, BODY)
    assert isinstance(decision, Decision), decision
    return decision


def reconfigure(fleet: Fleet, *endpoints: Endpoint, models: tuple[str, ...] = ("*",)) -> None:
    fleet.load.update(endpoints, 5.0)
    urls = [endpoint.url for endpoint in endpoints]
    pool = PoolConfig.model_validate({"models": list(models), "workers": {"endpoints": urls}})
    fleet.scheduler.configure([pool], LoadSignal.ESTIMATE, AdmissionSettings())


def target(decision: Decision) -> bytes:
    return dict(decision.headers)["x-dp-decode-host"]


def test_an_endpoint_that_is_left_out_drains() -> None:
    """Its reservation ends once, with its request, and only then it is dropped."""
    fleet = Fleet(workers=[WORKER, WORKER])
    first = place(fleet)
    gone, stays = sorted(fleet.endpoints, key=lambda each: address_of(each).encode() != target(first))
    reconfigure(fleet, stays)

    assert {target(place(fleet)) for _ in range(10)} == {address_of(stays).encode()}
    assert [(load.url, load.reservations) for load in fleet.load.draining] == [(gone.url, 1)]
    assert first.in_flight is not None
    first.in_flight.first_byte(200, fleet.clock())
    first.in_flight.end(fleet.clock())
    assert fleet.load.draining == []


def test_an_endpoint_that_stays_keeps_its_load() -> None:
    """Earlier requests still count."""
    fleet = Fleet(workers=[WORKER])
    place(fleet)
    (endpoint,) = fleet.endpoints
    load = fleet.endpoint(Role.WORKER)
    reconfigure(fleet, endpoint, make_endpoint(Role.WORKER, 2))

    assert fleet.endpoint(Role.WORKER) is load
    assert load.reservations == 1


def test_an_endpoint_that_is_configured_again_while_it_drains_keeps_its_load() -> None:
    """Nothing is counted twice, and nothing is lost."""
    fleet = Fleet(workers=[WORKER, WORKER])
    first = place(fleet)
    both = tuple(fleet.endpoints)
    gone, stays = sorted(both, key=lambda each: address_of(each).encode() != target(first))
    reconfigure(fleet, stays)
    reconfigure(fleet, *both)

    assert fleet.load.by_url[gone.url].reservations == 1
    assert fleet.load.draining == []


def test_an_endpoint_in_another_role_begins_without_load() -> None:
    """A request of its former role ends on the former load."""
    fleet = Fleet(workers=[WORKER])
    first = place(fleet)
    old = fleet.endpoints[0]
    new = Endpoint(old.url, old.host, old.port, old.pool, Role.DECODE)
    fleet.load.update([new], 5.0)

    assert fleet.load.by_url == {}
    fleet.load.discovered(new, address_of(new), make_facts(Role.DECODE), fleet.clock())
    assert fleet.load.by_url[new.url].reservations == 0
    assert first.in_flight is not None
    first.in_flight.end(fleet.clock())
    assert fleet.load.draining == []


def test_a_pool_may_be_removed_while_requests_are_in_flight() -> None:
    """They end like any other; new ones for its models are refused."""
    fleet = Fleet(workers=[WORKER])
    first = place(fleet)
    reconfigure(fleet, make_endpoint(Role.WORKER, 2, pool="other"), models=("other",))

    refused = fleet.scheduler.place(Api.GENERATE, json.dumps({"text": "x", "model": "gone"}).encode())
    assert isinstance(refused, Rejection)
    assert first.in_flight is not None
    first.in_flight.first_byte(200, fleet.clock())
    first.in_flight.end(fleet.clock())
    assert fleet.load.draining == []


def test_endpoints_of_a_removed_pool_drain_through_further_changes() -> None:
    """They drain anew with each reload until the request ends."""
    fleet = Fleet(workers=[WORKER])
    first = place(fleet)
    for number in (2, 3):
        reconfigure(fleet, make_endpoint(Role.WORKER, number, pool=f"other{number}"), models=(f"other{number}",))

    assert [load.reservations for load in fleet.load.draining] == [1]
    assert first.in_flight is not None
    first.in_flight.end(fleet.clock())
    assert fleet.load.draining == []


def test_a_pool_that_gets_another_model_keeps_what_was_learned() -> None:
    """It has another name then; load, prefixes and token ratio stay."""
    fleet = Fleet(workers=[WORKER])
    place(fleet)
    (old,) = fleet.endpoints
    load, ratio, prefixes = fleet.endpoint(Role.WORKER), fleet.load.ratios["*"], fleet.load.prefixes["*"]
    reconfigure(fleet, replace(old, pool="*,more"), models=("*", "more"))

    assert fleet.endpoint(Role.WORKER) is load
    assert load.reservations == 1
    assert fleet.load.ratios == {"*,more": ratio}
    assert fleet.load.prefixes == {"*,more": prefixes}
    assert fleet.load.prefixes["*,more"] is prefixes
    assert fleet.load.draining == []


def test_an_endpoint_that_moves_to_another_pool_keeps_its_load_alone() -> None:
    """Its prefixes are of another model."""
    fleet = Fleet(workers=[WORKER, WORKER])
    place(fleet)
    place(fleet)
    stays, moves = fleet.endpoints
    index = fleet.load.prefixes["*"]
    fleet.load.update([stays, replace(moves, pool="other")], 5.0)

    assert fleet.load.by_url[moves.url].reservations == 1
    assert fleet.load.prefixes["*"] is index
    assert fleet.load.prefixes["other"] is not index
    request = read_body(Api.GENERATE, BODY)
    assert isinstance(request, InferenceRequest)
    held_by = index.cached(prefix_of(request), 100, None).by_rank.keys()
    assert held_by
    assert held_by.isdisjoint(fleet.load.by_url[moves.url].ranks)


def test_requests_of_a_replaced_engine_stay_on_its_former_load() -> None:
    """They count until they end, as the engine may be an upgraded one that still drains."""
    fleet = Fleet(workers=[WORKER])
    place(fleet)
    (endpoint,) = fleet.endpoints
    fleet.load.discovered(endpoint, address_of(endpoint), make_facts(Role.WORKER, ranks=8), fleet.clock())

    assert fleet.endpoint(Role.WORKER).reservations == 0
    assert [load.reservations for load in fleet.load.draining] == [1]


def test_every_request_to_an_engine_has_the_key_of_its_pool() -> None:
    """For both pool shapes, and for requests that any engine can answer; a new key is used from then on."""
    credentials = Credentials({"*": "first"})
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
    scheduler = fleet.make_scheduler(credentials=credentials)

    def sent_keys() -> set[bytes]:
        decisions = [scheduler.place(Api.GENERATE, BODY), scheduler.look_up()]
        assert all(isinstance(each, Decision) for each in decisions)
        return {dict(each.headers)["authorization"] for each in decisions if isinstance(each, Decision)}

    assert sent_keys() == {b"Bearer first"}
    credentials.update({"*": "second"})
    assert sent_keys() == {b"Bearer second"}
    assert "second" not in repr(credentials)


def test_the_health_of_a_draining_endpoint_is_dropped() -> None:
    """Neither its last requests nor its failures of before count when it is configured again."""
    fleet = Fleet(workers=[WORKER, WORKER])
    first = place(fleet)
    both = tuple(fleet.endpoints)
    gone, stays = sorted(both, key=lambda each: address_of(each).encode() != target(first))
    load = fleet.load.by_url[gone.url]

    def fails() -> None:
        for _ in range(DEFAULT_HEALTH.consecutive_failures):
            load.health.failed(fleet.clock())

    fails()
    assert fleet.load.unhealthy == [load]
    reconfigure(fleet, stays)
    assert fleet.load.unhealthy == []
    fails()  # the request that it still has
    assert fleet.load.unhealthy == []
    reconfigure(fleet, *both)
    assert fleet.load.by_url[gone.url] is load
    assert not load.health.is_ejected(fleet.clock())
    fails()
    assert fleet.load.unhealthy == [load]


def test_counts_of_removed_endpoints_are_dropped() -> None:
    """Otherwise they would grow with each endpoint that comes and goes."""
    fleet = Fleet(workers=[WORKER, WORKER])
    telemetry = Telemetry(fleet.load, fleet.clock)
    stays, gone = fleet.endpoints
    for endpoint in (stays, gone):
        for listener in (fleet.load, telemetry):
            listener.sampled(endpoint, LoadPage((), prompt_tokens=5), fleet.clock(), fleet.clock())
            listener.failed(endpoint, EngineFailure(FailureKind.TIMEOUT, "slow"), fleet.clock())
    reconfigure(fleet, stays)
    telemetry.forget_all_but({stays.url})
    reconfigure(fleet, stays, gone)
    counted = [line for line in telemetry.page().decode().splitlines() if line.startswith("dp_extproc_load_")]

    assert [line for line in counted if gone.url in line and not line.endswith(" 0.0")] == []
    assert len([line for line in counted if stays.url in line and line.endswith(" 1.0")]) == 2
    assert set(fleet.load.ratios["*"]._engines) == {stays.url}


def test_another_engine_at_the_url_of_an_endpoint_begins_without_load() -> None:
    """Kubernetes gives an IP address to another pod, which has none of the requests and prefixes."""
    fleet = Fleet(workers=[WORKER])
    old = replace(fleet.endpoints[0], uid="one")
    reconfigure(fleet, old)
    first = place(fleet)
    new = replace(old, uid="another")
    reconfigure(fleet, new)

    assert fleet.load.by_url == {}
    assert not fleet.load.takes(new, fleet.clock())
    assert [load.reservations for load in fleet.load.draining] == [1]
    fleet.load.discovered(new, address_of(new), WORKER, fleet.clock())
    assert fleet.load.by_url[new.url].reservations == 0
    assert fleet.load.takes(new, fleet.clock())
    assert first.in_flight is not None
    first.in_flight.end(fleet.clock())
    assert fleet.load.draining == []


def test_endpoint_keeps_its_load_when_its_source_begins_or_ceases_to_report_uids() -> None:
    """One source may take the place of another that has only addresses, and nothing is interrupted."""
    fleet = Fleet(workers=[WORKER])
    (endpoint,) = fleet.endpoints
    load = fleet.endpoint(Role.WORKER)
    first = place(fleet)
    for uid in ("one", "", "one"):
        reconfigure(fleet, replace(endpoint, uid=uid))
        assert fleet.endpoint(Role.WORKER) is load
        assert load.configured.uid == uid
        assert target(place(fleet)) == target(first)
    assert fleet.load.draining == []


def test_endpoints_of_a_new_revision_take_requests_when_both_roles_are_there() -> None:
    """Until then their predecessors have to stay, as there is no other pair."""
    prefill, decode = make_facts(Role.PREFILL), make_facts(Role.DECODE)
    fleet = Fleet(prefills=[prefill, prefill], decodes=[decode, decode])
    old, new = (
        [replace(each, group=group) for each in fleet.endpoints[number::2]] for number, group in ((0, "v1"), (1, "v2"))
    )

    fleet.load.update([*old, new[0]], 5.0)
    assert [fleet.load.takes(each, fleet.clock()) for each in (*old, new[0])] == [True, True, False]
    fleet.load.update([*old, *new], 5.0)
    fleet.load.discovered(new[1], address_of(new[1]), decode, fleet.clock())
    assert all(fleet.load.takes(each, fleet.clock()) for each in (*old, *new))


def test_pool_without_endpoints_refuses_until_one_is_discovered() -> None:
    """Its source may report later."""
    fleet = Fleet(workers=[WORKER])
    (endpoint,) = fleet.endpoints
    fleet.load.update([], 5.0, ["*"])
    refused = fleet.scheduler.place(Api.GENERATE, BODY)
    assert isinstance(refused, Rejection)
    assert refused.status == 503

    fleet.load.update([endpoint], 5.0, ["*"])
    fleet.load.discovered(endpoint, address_of(endpoint), WORKER, fleet.clock())
    fleet.sample(endpoint, [0, 0, 0, 0])
    assert target(place(fleet)) == address_of(endpoint).encode()


def test_engine_that_is_not_ready_is_used_only_without_another() -> None:
    """It is used again when it is discovered anew."""
    fleet = Fleet(workers=[WORKER, WORKER])
    pausing, other = fleet.endpoints
    not_ready = EngineFailure(FailureKind.NOT_READY, "/ready answered 503", page_was_read=True)
    fleet.load.failed(pausing, not_ready, fleet.clock())
    assert {target(place(fleet)) for _ in range(10)} == {address_of(other).encode()}

    fleet.load.failed(other, not_ready, fleet.clock())
    assert len({target(place(fleet)) for _ in range(30)}) == 2
    fleet.load.discovered(pausing, address_of(pausing), WORKER, fleet.clock())
    assert {target(place(fleet)) for _ in range(10)} == {address_of(pausing).encode()}
