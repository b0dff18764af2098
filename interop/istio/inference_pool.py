"""The service as the endpoint picker of an InferencePool, on a gateway of which Istio writes every part.

The InferencePool selects the decode engines. The service reads it, finds the prefill engines by their labels, and sends
the prefill legs.
"""

import asyncio
import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import httpx

from dp_extproc.envoy_check import Severity, audit
from dp_extproc.envoy_check.reader import read_envoy
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from e2e.hosted_gateways import GATEWAYS, override_host
from faults.fleet import BODIES, Outcome, ask
from faults.test_other_front_doors import forged_headers
from interop.istio.control_plane import NAMESPACE, ControlPlane
from interop.istio.gateways import (
    HOST,
    NEIGHBOUR,
    POOLED,
    Resource,
    http_route,
    prepare,
    resource,
    run_envoy,
    run_pod,
)
from interop.istio.recording import Delivered, delivered
from interop.mesh import scenarios
from interop.mesh.scenarios import CHAT, Scenario, kill_with_a_leg, run_scenarios
from interop.mesh.site import Pods, Site, open_site, run_fleet
from interop.report import Report
from patience import wait_for

_GROUP: Final = "inference.networking.k8s.io"
_POOL: Final = "qwen3"
_PICKER: Final = "dp-extproc"
_PICKER_ADDRESS: Final = "10.77.0.2"
_PICKER_PORT: Final = 9002
_LABELS: Final = {"app": "qwen3"}
_PODS: Final = Pods(
    prefill=("10.77.0.11", "10.77.0.12"),
    decode=("10.77.0.21", "10.77.0.22"),
    port=18000,
    sources={
        "prefill": {"kubernetes": {"pods": "app=qwen3,role=prefill", "namespace": NAMESPACE, "port": 18000}},
        "decode": {"kubernetes": {"inference_pool": _POOL, "namespace": NAMESPACE}},
    },
)
_WRITTEN: Final = {"x-envoy-attempt-count", "x-envoy-external-address", "x-envoy-decorator-operation"}
_LEFT: Final = "x-envoy-original-dst-host"
"""Istio removes no such header of a client. It is for clusters of a type that an InferencePool does not have."""
_PATIENCE: Final = 30.0
_MANY: Final = 16
_STREAM_SECONDS: Final = 6
_SHORT_DRAIN: Final = 2
_RETRIES: Final = r"upstream_rq_retry$"
_HIGH: Final = 1_000_000
"""Limit of connections and requests that no gateway meets."""


def run_inference_pool(plane: ControlPlane, report: Report, only: Sequence[str], *, tls: bool) -> None:
    """Run the scenarios that apply to a gateway which asks the service, and sends the decode leg alone.

    *tls* is whether the gateway reaches the service by TLS.
    """
    report.shape = POOLED.title
    os.environ["KUBECONFIG"] = str(plane.cluster.directory / "controllers.yaml")
    for role, addresses in (("prefill", _PODS.prefill), ("decode", _PODS.decode)):
        for number, address in enumerate(addresses):
            run_pod(plane, f"{role}-{number}", {**_LABELS, "role": role}, address, _PODS.port)
    run_pod(plane, _PICKER, {"app": _PICKER}, _PICKER_ADDRESS, _PICKER_PORT)
    pool, *others = _resources(tls=tls)
    plane.apply(pool)
    listen = {"grpc": f"{_PICKER_ADDRESS}:{_PICKER_PORT}", **({"tls": {"self_signed": True}} if tls else {})}
    with run_fleet(pods=_PODS, protocol="endpoint_picker", retry={}, listen=listen) as fleet:
        wait_for(lambda: len(fleet.endpoints()) == len(fleet.engines), _PATIENCE)
        prepare(plane, POOLED, fleet.config.envoy.inference.port)
        with (
            run_envoy(plane, POOLED, fleet.config, drain_seconds=_SHORT_DRAIN) as envoy,
            open_site(fleet, envoy, HOST, NEIGHBOUR, report, gateway_headers=_WRITTEN | {_LEFT}) as site,
        ):

            def pool_is_accepted(site: Site) -> None:
                """Istio accepts the InferencePool, and configures Envoy as the tests do."""
                _apply(plane, site, others)
                _compare(site, delivered(envoy.admin_url))
                _audit(site, envoy)

            run_scenarios(site, [pool_is_accepted])
            run_scenarios(site, _SCENARIOS, only)


def _resources(*, tls: bool) -> list[Resource]:
    """Build the InferencePool, and what makes Istio use it. The Service is that of the Helm chart."""
    picker = {"name": _PICKER, "port": {"number": _PICKER_PORT}, "failureMode": "FailClose"}
    selector = {"matchLabels": {**_LABELS, "role": "decode"}}
    pool = {"selector": selector, "targetPorts": [{"number": _PODS.port}], "endpointPickerRef": picker}
    protocol = "http2" if tls else "kubernetes.io/h2c"
    port = {"name": "grpc-ext-proc", "port": _PICKER_PORT, "targetPort": _PICKER_PORT, "appProtocol": protocol}
    rule = {
        "host": f"{_PICKER}.{NAMESPACE}.svc.cluster.local",
        "trafficPolicy": {"tls": {"mode": "SIMPLE", "insecureSkipVerify": True}},
    }
    return [
        resource(f"{_GROUP}/v1", "InferencePool", _POOL, pool),
        resource("v1", "Service", _PICKER, {"selector": {"app": _PICKER}, "ports": [port]}),
        *([resource("networking.istio.io/v1", "DestinationRule", _PICKER, rule)] if tls else []),
        http_route(_POOL, POOLED.name, HOST, {"group": _GROUP, "kind": "InferencePool", "name": _POOL}),
    ]


def _apply(plane: ControlPlane, site: Site, resources: Sequence[Resource]) -> None:
    wait_for(lambda: site.neighbour.get("/").status_code == httpx.codes.OK, _PATIENCE)
    began = threading.Event()
    streaming = site.threads.submit(site.stream_of_neighbour, _STREAM_SECONDS, began.set)
    assert began.wait(_PATIENCE)
    plane.apply(*resources)
    wait_for(lambda: site.client.post(CHAT, json=BODIES[CHAT]).status_code == httpx.codes.OK, _PATIENCE)
    pool = plane.cluster.request("GET", f"/apis/{_GROUP}/v1/namespaces/{NAMESPACE}/inferencepools/{_POOL}")
    (parent,) = pool["status"]["parents"]
    conditions = {each["type"]: each["status"] for each in parent["conditions"]}
    seen = ", ".join(f"{name} {value}" for name, value in sorted(conditions.items()))
    site.report.add("status of the InferencePool", seen, good=set(conditions.values()) == {"True"})
    case = f"first InferencePool under a stream of {_STREAM_SECONDS} s of the neighbour, drain time {_SHORT_DRAIN} s"
    # Istio adds its filter to the listener, which Envoy then drains.
    site.report.add(case, seen := streaming.result(), good=seen.startswith("cut"))
    rejected = site.count(r"(update_rejected|update_failure)$")
    site.report.add("updates that Envoy rejected", str(rejected), good=rejected == 0)


def _compare(site: Site, found: Delivered) -> None:
    """Compare what was delivered with what the end-to-end tests replay, and describe the rest."""
    replayed = GATEWAYS["istio"]
    ((settings, manager),) = [
        (each["typed_config"], manager) for manager, each in _filters(found) if each["name"].endswith(".ext_proc")
    ]
    (route,) = [each for each in _routes(found) if "typed_per_filter_config" in each]
    overrides = route["typed_per_filter_config"]["envoy.filters.http.ext_proc"]["overrides"]
    picker = overrides["grpc_service"]["envoy_grpc"].pop("cluster_name")
    clusters = {each["name"]: each for each in found["dynamic_active_clusters"]}
    engines = clusters[route["route"]["cluster"]]
    assert replayed.per_route is not None
    expected = {**replayed.per_route["overrides"], "grpc_service": {"envoy_grpc": {}}}
    policy = override_host([])["load_balancing_policy"]
    different = [
        name
        for name, theirs, ours in (
            ("filter", {key: value for key, value in settings.items() if key != "@type"}, replayed.ext_proc),
            ("route", overrides, expected),
            ("policy of the engines' cluster", engines["load_balancing_policy"], policy),
        )
        if theirs != ours
    ]
    for name, theirs in (("filter", settings), ("route", overrides), ("policy", engines["load_balancing_policy"])):
        if any(name in each for each in different):
            print(name, json.dumps(theirs))
    site.report.add("differences to the replayed gateway", ", ".join(different) or "none", good=not different)
    retry = route["route"].get("retry_policy", {})
    timeout = route["route"].get("timeout")
    seen = f"timeout {timeout}; {retry.get('num_retries', 0)} retries on {retry.get('retry_on', 'nothing')}"
    site.report.add("route to the InferencePool", seen, good=timeout == "0s")
    for title, each in (("engines", engines), ("picker", clusters[picker])):
        (limits,) = each["circuit_breakers"]["thresholds"]
        lowest = min(limits[f"max_{name}"] for name in ("connections", "pending_requests", "requests", "retries"))
        seen = f"{each['type']}, lowest limit {lowest}, TLS: {'transport_socket' in each}"
        site.report.add(f"cluster of the {title}", seen, good=lowest >= _HIGH)
    site.report.add("timeout of idle streams", str(manager.get("stream_idle_timeout")), good=True)


def _filters(found: Delivered) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for listener in found["dynamic_listeners"]:
        for chain in listener.get("filter_chains", ()):
            for manager in (each["typed_config"] for each in chain["filters"]):
                for each in manager.get("http_filters", ()):
                    yield manager, each


def _routes(found: Delivered) -> Iterator[dict[str, Any]]:
    for routes in found["dynamic_route_configs"]:
        for host in routes["virtual_hosts"]:
            yield from host["routes"]


def _audit(site: Site, envoy: EnvoyProcess) -> None:
    findings = audit(asyncio.run(read_envoy([envoy.admin_url])), site.fleet.config)
    seen = ", ".join(sorted({each.code for each in findings})) or "nothing"
    good = all(each.severity is not Severity.ERROR for each in findings)
    site.report.add("dp-extproc check --envoy", seen, good=good)


def prefill_is_killed(site: Site) -> None:
    """Requests whose prefill leg was on a killed engine get an error, and no other request does."""
    _add_kill(site, "prefill engine killed with a leg that it had not answered", site.fleet.prefills[0])


def decode_is_killed(site: Site) -> None:
    """Requests whose decode leg was on a killed engine get an error, and no other request does."""
    _add_kill(site, "decode engine killed before its first byte", site.fleet.decodes[0])


def _add_kill(site: Site, case: str, engine: EngineProcess) -> None:
    met, outcomes = kill_with_a_leg(site, engine)
    failed = sum(not each.complete for each in outcomes)
    good = _are_clean(outcomes) and 0 < failed <= met
    site.report.add(case, f"{len(outcomes)} requests, {met} at the killed engine: {_counted(outcomes)}", good=good)


def decode_refuses_connections(site: Site) -> None:
    """Requests that are sent to an engine which has just ended are repeated by the gateway, or get an error."""
    before, elsewhere = site.count(_RETRIES), _mismatches(site)
    site.fleet.decodes[0].stop(signal.SIGKILL)
    asked = [site.threads.submit(ask, site.client, CHAT, stream=bool(each % 2)) for each in range(_MANY)]
    outcomes = [each.result() for each in asked]
    repeated = site.count(_RETRIES) - before
    site.fleet.recover()
    site.fleet.settle()
    seen = (
        f"{_counted(outcomes)}; {repeated} repeated by the gateway, {_mismatches(site)} served by another than the pick"
    )
    good = _are_clean(outcomes) and elsewhere == 0
    site.report.add(f"{_MANY} chats after a decode engine has ended", seen, good=good)


def _mismatches(site: Site) -> int:
    (found,) = re.findall(
        r"^dp_extproc_destination_mismatches_total (\S+)$", site.fleet.service.metrics(), re.MULTILINE
    )
    return int(float(found))


def errors_of_engines_are_final(site: Site) -> None:
    """The gateway repeats no request that an engine has answered: the room in its body can be used once."""
    before = site.count(_RETRIES)
    scenarios.all_engines_fail(site)
    repeated = site.count(_RETRIES) - before
    site.report.add("repeated by the gateway after the 503", str(repeated), good=repeated == 0)


def _counted(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(f"{count} {text}" for text, count in sorted(Counter(map(str, outcomes)).items()))


def _are_clean(outcomes: Sequence[Outcome]) -> bool:
    """Return whether each is an answer or an error, and none is a part or nothing."""
    return all(each.complete or (each.status or 0) >= httpx.codes.INTERNAL_SERVER_ERROR for each in outcomes)


def killed_in_mid_stream(site: Site) -> None:
    """The gateway cuts a stream whose decode engine is killed; one whose prefill engine is killed goes on."""
    scenarios.killed_in_mid_stream(site, of_decode="part of the answer")


def large_bodies(site: Site) -> None:
    """A body of 1 MB, and those of the block."""
    body: Mapping[str, Any] = {**BODIES[CHAT], "padding": "x" * 1_000_000}
    answer = site.client.post(CHAT, json=body)
    site.report.add("body of 1 MB", str(answer.status_code), good=answer.status_code == httpx.codes.OK)
    site.fleet.settle()
    scenarios.large_body(site)


def forged_headers_of_envoy(site: Site) -> None:
    """Of the headers for Envoy's router that a client sends, one arrives at an engine, where it means nothing."""
    forged = {name: value for name, value in forged_headers("", "192.0.2.1:9").items() if name.startswith("x-envoy-")}
    answer = site.client.post(CHAT, json=BODIES[CHAT], headers=forged)
    site.fleet.settle()
    legs = [leg["headers"] for engine in site.fleet.engines for leg in engine.requests()]
    arrived = sorted({name for leg in legs for name, value in forged.items() if leg.get(name) == value})
    seen = f"{answer.status_code}; {', '.join(arrived) or 'none'}"
    site.report.add("x-envoy-* of a client at engines", seen, good=answer.is_success and arrived == [_LEFT])


def service_is_killed(site: Site) -> None:
    """Without the service the InferencePool fails closed, and the neighbour is served."""
    site.fleet.forget()
    site.fleet.service.stop(signal.SIGKILL)
    refused, other = ask(site.client, CHAT, stream=False), site.neighbour.get("/").status_code
    reached = sum(len(engine.requests()) for engine in site.fleet.engines)
    site.fleet.service.start()
    site.fleet.service.wait_until_listening()
    wait_for(lambda: ask(site.client, CHAT, stream=False).complete, _PATIENCE)
    seen = f"{refused}; at engines: {reached}; neighbour {other}; then an answer"
    good = (refused.status or 0) >= httpx.codes.INTERNAL_SERVER_ERROR and reached == 0 and other == httpx.codes.OK
    site.report.add("service killed, then started", seen, good=good)
    site.fleet.recover()


_SCENARIOS: Final[Sequence[Scenario]] = (
    scenarios.both_legs,
    scenarios.responses_of_each_form,
    scenarios.stream_arrives_in_pieces,
    scenarios.many_at_once,
    errors_of_engines_are_final,
    large_bodies,
    prefill_is_killed,
    decode_is_killed,
    decode_refuses_connections,
    killed_in_mid_stream,
    scenarios.client_aborts,
    scenarios.hostile_headers,
    forged_headers_of_envoy,
    scenarios.neighbour_is_untouched,
    service_is_killed,
    scenarios.old_client,
)
