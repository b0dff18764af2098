"""Envoy Gateway with the service as an endpoint picker: the service sends prefill legs, and the gateway decode legs."""

import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from dp_extproc import contract
from faults.fleet import BODIES, Outcome, ask
from interop.envoy_gateway.cases import HOST, NEIGHBOUR, OURS, Rig, neighbour_of
from interop.envoy_gateway.control_plane import GATEWAY, NAMESPACE, PORT, ControlPlane
from interop.mesh import scenarios
from interop.mesh.scenarios import (
    CHAT,
    both_legs,
    client_aborts,
    faulty,
    hostile_headers,
    kill_with_a_leg,
    large_body,
    many_at_once,
    neighbour_is_untouched,
    responses_of_each_form,
    stream_arrives_in_pieces,
)
from interop.mesh.site import MAX_BODY_BYTES, Fleet, Neighbour, Site, open_site
from interop.report import Report
from patience import wait_for

EXAMPLE: Final = Path(__file__).parents[2] / "envoy" / "envoy-gateway-picker.yaml"
SECTIONS: Final[Mapping[str, Any]] = {"protocol": "endpoint_picker", "retry": {"attempts": 1}}
"""Sections of the configuration. The gateway does not ask for another endpoint."""
_HEADERS: Final = frozenset({"x-envoy-external-address", "x-envoy-original-dst-host"})
"""The gateway writes the one and ignores the other, and engines read neither."""
_API: Final = "gateway.networking.k8s.io"
_GATEWAY: Final = (
    {
        "apiVersion": f"{_API}/v1",
        "kind": "GatewayClass",
        "metadata": {"name": "eg"},
        "spec": {"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"},
    },
    {
        "apiVersion": f"{_API}/v1",
        "kind": "Gateway",
        "metadata": {"name": GATEWAY, "namespace": NAMESPACE},
        "spec": {"gatewayClassName": "eg", "listeners": [{"name": "http", "protocol": "HTTP", "port": PORT}]},
    },
)
"""Another team's gateway; its Envoy has no bootstrap extension."""
_PATIENCE: Final = 30.0
_LONG: Final = 12
"""Seconds of a stream. Envoy Gateway writes a timeout of 10 s for the calls of an ``extProc``."""

Resource = dict[str, Any]
Change = Callable[[Mapping[str, Resource]], None]


_ROUTES: Final = f"{NAMESPACE}/{GATEWAY}/http"
_OURS_AMONG_ROUTES: Final = f"$.virtual_hosts[*].routes[?(@.route.cluster=='httproute/{NAMESPACE}/{OURS}/rule/0')]"
_HEADERS_AND_TRAILERS: Final = {
    "request_header_mode": "SEND",
    "request_body_mode": "FULL_DUPLEX_STREAMED",
    "request_trailer_mode": "SEND",
    "response_header_mode": "SEND",
    "response_body_mode": "NONE",
    "response_trailer_mode": "SEND",
}


def _duplex(_: Mapping[str, Resource]) -> None:
    """Leave the example as it is."""


def _buffered(resources: Mapping[str, Resource]) -> None:
    """Send whole request bodies, which the routes have to buffer."""
    _modes(resources)["request"] = {"body": "Buffered"}
    _patch_route(resources, "/request_body_buffer_limit", MAX_BODY_BYTES + (1 << 20))


def _without_response_bodies(resources: Mapping[str, Resource]) -> None:
    """Send headers and trailers of responses alone: the service then pays for no event of a stream."""
    _modes(resources)["response"] = {}
    value = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute",
        "overrides": {"processing_mode": _HEADERS_AND_TRAILERS},
    }
    _patch_route(resources, "/config", value, inside=".typed_per_filter_config.*")


def _modes(resources: Mapping[str, Resource]) -> dict[str, Any]:
    modes: dict[str, Any] = resources["EnvoyExtensionPolicy"]["spec"]["extProc"][0]["processingMode"]
    return modes


def _patch_route(resources: Mapping[str, Resource], path: str, value: Any, inside: str = "") -> None:
    operation = {"op": "add", "jsonPath": _OURS_AMONG_ROUTES + inside, "path": path, "value": value}
    kind = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
    patches = resources["EnvoyPatchPolicy"]["spec"]["jsonPatches"]
    patches.append({"type": kind, "name": _ROUTES, "operation": operation})


MODES: Final[Mapping[str, Change]] = {
    "picker": _duplex,
    "picker_buffered": _buffered,
    "picker_without_response_bodies": _without_response_bodies,
}
"""Changes of the example, each for a gateway of its own, by the name for ``--only``."""


def resources_of(port: int, change: Change) -> str:
    """Return the example with the gateway and the service of the run, and a change."""
    text = EXAMPLE.read_text(encoding="utf-8").replace("name: eg", f"name: {GATEWAY}")
    resources = list(yaml.safe_load_all(text))
    resources[0]["spec"]["endpoints"] = [{"ip": {"address": "127.0.0.1", "port": port}}]
    change({each["kind"]: each for each in resources})
    return yaml.safe_dump_all(resources)


@contextmanager
def run_gateway(plane: ControlPlane, fleet: Fleet, neighbour: Neighbour, report: Report, mode: str) -> Iterator[Rig]:
    """Run Envoy Gateway with a plain gateway, the route of a neighbour, and the example in one of the modes."""
    text = resources_of(fleet.config.listen.grpc.port, MODES[mode])
    plane.apply("gateway", yaml.safe_dump_all(_GATEWAY))
    plane.apply("neighbour", neighbour_of(neighbour.port))
    plane.apply("ours", text)
    report = replace(report, shape=f"{report.shape}, {mode}")
    with plane, open_site(fleet, plane, HOST, NEIGHBOUR, report, gateway_headers=_HEADERS) as site:
        yield Rig(site, plane, {"dp-extproc.yaml": text})


def programmed(rig: Rig) -> None:
    """Envoy Gateway applies everything, and Envoy rejects nothing."""
    wait_for(lambda: rig.programmed()[0] and rig.asks() == "answer", _PATIENCE)
    status, message = rig.programmed()
    rig.add("EnvoyPatchPolicy", f"Programmed={status}: {message}", good=status == "True")
    status, message = rig.plane.conditions("EnvoyExtensionPolicy", OURS)["Accepted"]
    rig.add("EnvoyExtensionPolicy", f"Accepted={status}: {message}", good=status == "True")
    rejected = rig.site.count(r"(update_rejected|update_failure)$")
    rig.add("updates that Envoy rejected", str(rejected), good=rejected == 0)
    rig.checked()


def applied_again(rig: Rig) -> None:
    """The first policy with an ``extProc`` adds a filter to the listener, for all routes of the gateway."""
    rig.plane.delete("ours")
    wait_for(lambda: rig.asks().startswith("404"), _PATIENCE)
    modified = rig.modified()
    rig.plane.apply("ours", rig.texts["dp-extproc.yaml"])
    wait_for(lambda: rig.asks() == "answer", _PATIENCE)
    changed = rig.modified() - modified
    rig.add("deleted and applied again", f"{changed} listeners modified; then an answer", good=changed == 1)


def picked_endpoint_serves(site: Site) -> None:
    """The header with the pick arrives at the endpoint that it names."""
    site.fleet.forget()
    for _ in range(8):
        site.client.post(CHAT, json=BODIES[CHAT])
    sent = [
        (leg["headers"].get(contract.DESTINATION), engine.url.removeprefix("http://"))
        for engine in site.fleet.decodes
        for leg in engine.requests()
    ]
    seen = f"{len(sent)} decode legs at {len({at for _, at in sent})} engines, each at the address in the header"
    site.report.add(contract.DESTINATION, seen, good=len(sent) == 8 and all(named == at for named, at in sent))


def long_stream(site: Site) -> None:
    """A stream may last longer than the timeout of the calls, and its reservation lasts as long."""
    during: list[float] = []
    with faulty(site.fleet.decodes, {"kind": "slow", "after": 1, "seconds": _LONG}):

        def look() -> None:
            time.sleep(1)
            during.append(_reservations(site))

        began = time.monotonic()
        outcome = ask(site.client, CHAT, stream=True, patience=2 * _LONG, on_first=look)
        took = time.monotonic() - began
    wait_for(lambda: _reservations(site) == 0)
    seen = f"{outcome} after {took:.0f} s; reservations during the stream: {during[0]:g}, then 0"
    site.report.add(f"stream of {_LONG} s", seen, good=outcome.complete and took > _LONG - 1 and during[0] > 0)


def failing_prefill(site: Site) -> None:
    """An error of prefill is a clean error for the client, and ends the decode leg."""
    for path in BODIES:
        site.fleet.forget()
        with faulty(site.fleet.prefills, "503"):
            outcomes = [str(ask(site.client, path, stream=stream)) for stream in (False, True)]
            site.fleet.settle()
        ends = Counter(leg["outcome"] for engine in site.fleet.decodes for leg in engine.requests())
        good = all(each.startswith("5") for each in outcomes) and not ends["finished"]
        site.report.add(f"prefill engines answer 503, {path}", f"{outcomes}; decode legs: {dict(ends)}", good=good)


def failing_decode(site: Site) -> None:
    """An error of decode goes to the client as it is, and ends the prefill leg."""
    site.fleet.forget()
    with faulty(site.fleet.decodes, "503"):
        outcome = str(ask(site.client, CHAT, stream=True))
        site.fleet.settle()
    ends = Counter(leg["outcome"] for engine in site.fleet.prefills for leg in engine.requests())
    good = outcome == "503 of the engine" and not ends["finished"]
    site.report.add("decode engines answer 503", f"{outcome}; prefill legs: {dict(ends)}", good=good)


def killed_engines(site: Site) -> None:
    """The requests of an engine that is killed before the response fail at once, and others get their answers.

    The decode engine may report the loss of its prefill engine first. In a stream that is an event behind status 200,
    which becomes an error only where the service sees response bodies.
    """
    for role, engine in (("prefill", site.fleet.prefills[0]), ("decode", site.fleet.decodes[0])):
        met, outcomes = kill_with_a_leg(site, engine)
        failed = [each for each in outcomes if not each.complete]
        results = Counter("an error event of the engine" if _has_error_event(each) else str(each) for each in outcomes)
        good = 0 < len(failed) <= met and all(_has_error_event(each) or (each.status or 0) >= 500 for each in failed)
        site.report.add(f"{role} engine killed with {met} legs", f"{dict(results)}", good=good)


def _has_error_event(outcome: Outcome) -> bool:
    return outcome.status == 200 and not outcome.complete and ('"error"' in outcome.text or '"abort"' in outcome.text)


def killed_in_mid_stream(site: Site) -> None:
    """The gateway cuts a stream whose decode engine is killed; one whose prefill engine is killed goes on."""
    scenarios.killed_in_mid_stream(site, of_decode="part of the answer")


def service_is_killed(site: Site) -> None:
    """Without the service our host fails closed, and the neighbour is served."""
    site.fleet.service.stop(signal.SIGKILL)
    refused = str(ask(site.client, CHAT, stream=False))
    other = site.neighbour.get("/").status_code
    scenarios.start_service_again(site)
    good = refused.startswith("503") and other == 200
    site.report.add("service killed, then started", f"{refused}; neighbour {other}; then an answer", good=good)


def forged_destination(site: Site) -> None:
    """A client cannot name the endpoint, whether the service reads its request or not."""
    site.fleet.forget()
    prefill = site.fleet.prefills[0].url.removeprefix("http://")
    headers = {contract.DESTINATION: prefill}
    body = json.dumps(BODIES[CHAT])
    statuses = {
        "chat": site.client.post(CHAT, json=BODIES[CHAT], headers=headers).status_code,
        "GET /v1/models": site.client.get("/v1/models", headers=headers).status_code,
        "PUT": site.client.put(CHAT, content=body, headers=headers).status_code,
        "compressed": site.client.post(CHAT, content=body, headers={**headers, "content-encoding": "gzip"}).status_code,
    }
    legs = [leg["outcome"] for leg in site.fleet.prefills[0].requests() + site.fleet.prefills[1].requests()]
    good = legs == ["finished"] and statuses["chat"] == 200 and max(statuses.values()) <= 503
    site.report.add(
        "forged x-gateway-destination-endpoint with the address of a prefill engine",
        f"{statuses}; requests at prefill engines: {len(legs)}",
        good=good,
    )


def _reservations(site: Site) -> float:
    lines = site.fleet.service.metrics().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("dp_extproc_reservations"))


CASES: Final[Sequence[Callable[[Rig], None]]] = (programmed, applied_again)
SCENARIOS: Final[Sequence[Callable[[Site], None]]] = (
    both_legs,
    picked_endpoint_serves,
    responses_of_each_form,
    stream_arrives_in_pieces,
    long_stream,
    many_at_once,
    large_body,
    failing_prefill,
    failing_decode,
    killed_engines,
    killed_in_mid_stream,
    client_aborts,
    hostile_headers,
    forged_destination,
    neighbour_is_untouched,
    service_is_killed,
)
