"""A fleet and policies that change while requests are on the books."""

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
from dp_extproc.scheduling.scheduler import Scheduler
from fleet_fixtures import Fleet, address_of, make_endpoint, make_facts, make_tokens

WORKER = make_facts(Role.WORKER)
BODY = json.dumps({"text": "x" * 400}).encode()


def place(fleet: Fleet) -> Decision:
    decision = fleet.dispatcher.place(Api.GENERATE, BODY)
    assert isinstance(decision, Decision), decision
    return decision


def reconfigure(fleet: Fleet, *endpoints: Endpoint, models: tuple[str, ...] = ("*",)) -> None:
    fleet.load.update(endpoints, 5.0)
    urls = [endpoint.url for endpoint in endpoints]
    pool = PoolConfig.model_validate({"models": list(models), "workers": {"endpoints": urls}})
    fleet.dispatcher.configure([pool], LoadSignal.ESTIMATE, AdmissionSettings())


def target(decision: Decision) -> bytes:
    return dict(decision.headers)["x-dp-decode-host"]


def test_a_server_that_is_left_out_gets_nothing_more_and_keeps_its_books_until_the_end() -> None:
    """Its reservation is released once, when its request ends, and only then it is forgotten."""
    fleet = Fleet(workers=[WORKER, WORKER])
    first = place(fleet)
    gone, stays = sorted(fleet.endpoints, key=lambda each: address_of(each).encode() != target(first))
    reconfigure(fleet, stays)

    assert {target(place(fleet)) for _ in range(10)} == {address_of(stays).encode()}
    assert [(host.url, host.reservations) for host in fleet.load.draining] == [(gone.url, 1)]
    assert first.in_flight is not None
    first.in_flight.first_byte(200, fleet.clock())
    first.in_flight.end(fleet.clock())
    assert fleet.load.draining == []


def test_a_server_that_stays_keeps_its_books() -> None:
    """What was sent to it before still counts against it."""
    fleet = Fleet(workers=[WORKER])
    place(fleet)
    (endpoint,) = fleet.endpoints
    host = fleet.host(Role.WORKER)
    reconfigure(fleet, endpoint, make_endpoint(Role.WORKER, 2))

    assert fleet.host(Role.WORKER) is host
    assert host.reservations == 1


def test_a_server_that_comes_back_before_its_last_request_ends_has_its_books_again() -> None:
    """Nothing is counted twice, and nothing is lost."""
    fleet = Fleet(workers=[WORKER, WORKER])
    first = place(fleet)
    both = tuple(fleet.endpoints)
    gone, stays = sorted(both, key=lambda each: address_of(each).encode() != target(first))
    reconfigure(fleet, stays)
    reconfigure(fleet, *both)

    assert fleet.load.by_url[gone.url].reservations == 1
    assert fleet.load.draining == []


def test_a_server_in_another_role_begins_anew() -> None:
    """Its books are those of its present role; the request of the former one ends on the old ones."""
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


def test_a_pool_may_go_while_its_requests_are_under_way() -> None:
    """Its request ends like any other; new ones for its models are refused."""
    fleet = Fleet(workers=[WORKER])
    first = place(fleet)
    reconfigure(fleet, make_endpoint(Role.WORKER, 2, pool="other"), models=("other",))

    refused = fleet.dispatcher.place(Api.GENERATE, json.dumps({"text": "x", "model": "gone"}).encode())
    assert isinstance(refused, Rejection)
    assert first.in_flight is not None
    first.in_flight.first_byte(200, fleet.clock())
    first.in_flight.end(fleet.clock())
    assert fleet.load.draining == []


def test_a_pool_that_is_gone_may_change_again_while_its_requests_are_under_way() -> None:
    """Its servers are let go once more, with each reload until the request ends."""
    fleet = Fleet(workers=[WORKER])
    first = place(fleet)
    for number in (2, 3):
        reconfigure(fleet, make_endpoint(Role.WORKER, number, pool=f"other{number}"), models=(f"other{number}",))

    assert [host.reservations for host in fleet.load.draining] == [1]
    assert first.in_flight is not None
    first.in_flight.end(fleet.clock())
    assert fleet.load.draining == []


def test_a_pool_that_gets_another_model_keeps_its_books() -> None:
    """It has another name then; what its servers have, hold and taught about lengths is still known."""
    fleet = Fleet(workers=[WORKER])
    place(fleet)
    (old,) = fleet.endpoints
    host, ratio, prefixes = fleet.host(Role.WORKER), fleet.load.ratios["*"], fleet.load.prefixes["*"]
    reconfigure(fleet, replace(old, pool="*,more"), models=("*", "more"))

    assert fleet.host(Role.WORKER) is host
    assert host.reservations == 1
    assert fleet.load.ratios == {"*,more": ratio}
    assert fleet.load.prefixes == {"*,more": prefixes}
    assert fleet.load.prefixes["*,more"] is prefixes
    assert fleet.load.draining == []


def test_a_server_that_moves_to_another_pool_keeps_its_books_alone() -> None:
    """What it holds is of another model."""
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
    held_by = index.held(prefix_of(request), 100, None).by_slot.keys()
    assert held_by
    assert held_by.isdisjoint(fleet.load.by_url[moves.url].ranks)


def test_an_engine_that_has_become_another_leaves_its_requests_on_the_old_books() -> None:
    """They are counted until they end, as the engine may be an upgraded one that still drains."""
    fleet = Fleet(workers=[WORKER])
    place(fleet)
    (endpoint,) = fleet.endpoints
    fleet.load.discovered(endpoint, address_of(endpoint), make_facts(Role.WORKER, ranks=8), fleet.clock())

    assert fleet.host(Role.WORKER).reservations == 0
    assert [host.reservations for host in fleet.load.draining] == [1]


def test_every_request_to_an_engine_shows_the_key_of_its_pool() -> None:
    """On single servers as on pairs, and for what any engine can answer; a new key is used from then on."""
    credentials = Credentials({"*": "first"})
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
    dispatcher = Scheduler(
        [fleet.pool],
        fleet.load,
        owner="127.0.0.1:9002",
        rng=fleet.dispatcher._rng,
        draw_token=make_tokens(),
        clock=fleet.clock,
        credentials=credentials,
    )

    def shown() -> set[bytes]:
        decisions = [dispatcher.place(Api.GENERATE, BODY), dispatcher.look_up()]
        assert all(isinstance(each, Decision) for each in decisions)
        return {dict(each.headers)["authorization"] for each in decisions if isinstance(each, Decision)}

    assert shown() == {b"Bearer first"}
    credentials.update({"*": "second"})
    assert shown() == {b"Bearer second"}
    assert "second" not in repr(credentials)


def test_the_health_of_a_server_that_leaves_is_dropped() -> None:
    """Also what its last requests tell of it, and when it is configured again."""
    fleet = Fleet(workers=[WORKER, WORKER])
    first = place(fleet)
    both = tuple(fleet.endpoints)
    gone, stays = sorted(both, key=lambda each: address_of(each).encode() != target(first))
    host = fleet.load.by_url[gone.url]

    def fails() -> None:
        for _ in range(DEFAULT_HEALTH.consecutive_failures):
            host.health.failed(fleet.clock())

    fails()
    assert fleet.load.unhealthy == [host]
    reconfigure(fleet, stays)
    assert fleet.load.unhealthy == []
    fails()  # the request that it still has
    assert fleet.load.unhealthy == []
    reconfigure(fleet, *both)
    assert fleet.load.by_url[gone.url] is host
    assert not host.health.is_ejected(fleet.clock())
    fails()
    assert fleet.load.unhealthy == [host]


def test_what_was_counted_of_servers_that_leave_is_dropped() -> None:
    """Or a fleet whose servers come and go would be remembered, and shown, for ever."""
    fleet = Fleet(workers=[WORKER, WORKER])
    telemetry = Telemetry(fleet.load, fleet.clock)
    stays, gone = fleet.endpoints
    for endpoint in (stays, gone):
        telemetry.sampled(endpoint, LoadPage((), prompt_tokens=5), fleet.clock(), fleet.clock())
        telemetry.failed(endpoint, EngineFailure(FailureKind.TIMEOUT, "slow"), fleet.clock())
    reconfigure(fleet, stays)
    telemetry.forget_all_but({stays.url})
    reconfigure(fleet, stays, gone)
    counted = [line for line in telemetry.page().decode().splitlines() if line.startswith("dp_extproc_load_")]

    assert [line for line in counted if gone.url in line and not line.endswith(" 0.0")] == []
    assert len([line for line in counted if stays.url in line and line.endswith(" 1.0")]) == 2
    assert set(fleet.load.ratios["*"]._engines) == {stays.url}
