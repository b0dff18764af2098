"""Istio's form, with what Istio's control plane made of it on real gateways (``make istio-run``), without Go.

Istio delivers clusters and listeners as they are printed, which the run compares. So the recorded print has only their
names, and a test puts the present print into the places of the delivered ones.
"""

import asyncio
import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from dp_extproc import contract
from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_check import Severity, audit
from dp_extproc.envoy_check.reader import read_envoy
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats.target import ObjectName, Target
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from envoy_config.harness import BODY, make_config
from envoy_config.recording_engine import RecordingEngine, run_engine
from envoy_config.scripted_service import ScriptedService, run_service
from faults.decoy import Decoy
from faults.test_other_front_doors import forged_headers

RECORDED: Final = Path(__file__).parent / "recorded" / "istio"
TARGETS: Final = {
    "shared": Target(
        ObjectName("istio-ingress", "shared"), ("llm.example.com",), 80, (), (("istio", "ingressgateway"),)
    ),
    "shared-api": Target(ObjectName("istio-ingress", "shared-api"), ("llm.example.com",), 80),
}
"""What the command line gave for each recording: a gateway of Istio's API, and one of the Gateway API."""
_BACKEND: Final = "outbound|80||backend.internal"


def recorded(kind: str) -> dict[str, Any]:
    """Read the printed resources of a recording, and what was delivered."""
    found: dict[str, Any] = json.loads((RECORDED / f"{kind}.json").read_text(encoding="utf-8"))
    return found


def printed(config: Config, target: Target) -> list[dict[str, Any]]:
    (text,) = FORMS["istio"].files(config, target).values()
    return list(yaml.safe_load_all(text))


def patches_of(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (patches,) = (each["spec"]["configPatches"] for each in resources if each["kind"] == "EnvoyFilter")
    return list(patches)


@pytest.mark.parametrize("kind", TARGETS)
def test_printed_resources_are_the_recorded_ones(kind: str) -> None:
    """Istio has to find the same places for the same names. A difference needs a new recording: make istio-run."""
    resources = printed(make_config(BodyMode.BUFFERED, [1, 2, 3]), TARGETS[kind])
    for patch in patches_of(resources):
        patch["patch"]["value"] = {"name": patch["patch"]["value"]["name"]}

    assert resources == recorded(kind)["printed"]


@pytest.mark.parametrize("kind", TARGETS)
def test_printed_names_were_delivered_once(kind: str) -> None:
    """Istio drops the second cluster of a name."""
    delivered = recorded(kind)["delivered"]
    for key, part in (("dynamic_active_clusters", "CLUSTER"), ("dynamic_listeners", "LISTENER")):
        names = [each["name"] for each in delivered[key]]
        ours = [
            patch["patch"]["value"]["name"]
            for patch in patches_of(recorded(kind)["printed"])
            if patch["applyTo"] == part
        ]
        assert len(ours) >= 3
        assert {names.count(name) for name in ours} == {1}


@dataclass(frozen=True, slots=True)
class Gateway:
    """An Envoy with the resources of a recorded gateway, and everything that it leads to."""

    client: httpx.Client
    envoy: EnvoyProcess
    service: ScriptedService
    prefill: RecordingEngine
    decode: RecordingEngine
    neighbour: RecordingEngine
    decoy: Decoy


@pytest.fixture(params=TARGETS)
def gateway(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    ports = free_ports(3)
    config = make_config(BodyMode.BUFFERED, ports)
    with ExitStack() as running:
        prefill, decode, neighbour = (
            running.enter_context(run_engine(name)) for name in ("prefill", "decode", "other")
        )
        service = running.enter_context(run_service(prefill.address, decode.address, ports[2]))
        bootstrap = _bootstrap(request.param, config, neighbour.address)
        envoy = running.enter_context(EnvoyProcess(config, bootstrap=json.dumps(bootstrap)))
        client = running.enter_context(loopback.client(envoy.url))
        decoy = Decoy()
        running.callback(decoy.close)
        yield Gateway(client, envoy, service, prefill, decode, neighbour, decoy)


@pytest.mark.parametrize("kind", TARGETS)
def test_check_accepts_a_recorded_gateway(kind: str, tmp_path: Path) -> None:
    """What Istio leaves at its own values is a warning at most, and the block is as it should be."""
    config = make_config(BodyMode.BUFFERED, [1, 2, 3])
    path = tmp_path / "gateway.json"
    path.write_text(json.dumps(_bootstrap(kind, config, "127.0.0.1:4")), encoding="utf-8")
    findings = audit(asyncio.run(read_envoy([str(path)])), config)

    assert {each.severity for each in findings} == {Severity.WARNING}
    assert {each.code for each in findings} == {"client_headers_kept", "delayed_close", "no_request_timeouts"}


def _bootstrap(kind: str, config: Config, neighbour: str) -> dict[str, Any]:
    """Build a static bootstrap from what was delivered, with the present print in the places of the recorded one."""
    delivered = recorded(kind)["delivered"]
    ours = patches_of(printed(config, TARGETS[kind]))

    def present(part: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        values = {each["patch"]["value"]["name"]: each["patch"]["value"] for each in ours if each["applyTo"] == part}
        return [values.get(each.get("name"), each) for each in items]

    (routes,) = delivered["dynamic_route_configs"]
    for virtual_host in routes["virtual_hosts"]:
        virtual_host["routes"] = present("HTTP_ROUTE", virtual_host["routes"])
    listeners = present("LISTENER", delivered["dynamic_listeners"])
    clusters = present("CLUSTER", delivered["dynamic_active_clusters"])
    for listener in listeners:
        if "internal_listener" not in listener:
            listener["address"]["socket_address"] = _address(str(config.envoy.inference))
            manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
            del manager["rds"]
            manager["route_config"] = routes
    backend = next(each for each in clusters if each["name"] == _BACKEND)
    del backend["eds_cluster_config"]
    endpoint = {"endpoint": {"address": {"socket_address": _address(neighbour)}}}
    assignment = {"cluster_name": _BACKEND, "endpoints": [{"lb_endpoints": [endpoint]}]}
    backend |= {"type": "STATIC", "load_assignment": assignment}
    internal = "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener"
    resources = {
        "listeners": listeners,
        "clusters": [each for each in clusters if each.get("type") != "EDS"],
    }
    return {
        "static_resources": _without_types(resources),
        "bootstrap_extensions": [
            {"name": "envoy.bootstrap.internal_listener", "typed_config": {"@type": internal, "buffer_size_kb": 64}}
        ],
        "admin": {"address": {"socket_address": _address(str(config.envoy.admin))}},
    }


def _without_types(resources: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Remove the types that delivered resources have, and those inside a bootstrap have not."""
    resources = copy.deepcopy(resources)
    for items in resources.values():
        for each in items:
            each.pop("@type", None)
            for chain in each.get("filter_chains", ()):
                chain["filters"][0]["typed_config"].get("route_config", {}).pop("@type", None)
    return resources


def _address(text: str) -> dict[str, Any]:
    host, _, port = text.rpartition(":")
    return {"address": host, "port_value": int(port)}


def test_recorded_gateway_leads_our_host_into_the_block_alone(gateway: Gateway) -> None:
    """Both legs arrive, forged headers have no effect, and the other host of the gateway gets its headers untouched."""
    headers = forged_headers("127.0.0.1:1", gateway.decoy.address)
    ours = gateway.client.post("/v1/completions", content=BODY, headers={**headers, "host": "llm.example.com"})
    theirs = {name: value for name, value in headers.items() if not name.startswith("x-envoy-")}
    other = gateway.client.post("/any", content=BODY, headers={**headers, "host": "other.example.com"})

    assert (ours.status_code, ours.json()["answered_by"]) == (200, "decode")
    assert (other.status_code, other.json()["answered_by"]) == (200, "other")
    request_id = gateway.decode.received[0].headers["x-request-id"]
    for engine in (gateway.decode, gateway.prefill):
        received = engine.one(request_id)
        assert [name for name in received.headers if name.startswith(contract.UNTRUSTED_PREFIXES)] == []
        assert contract.RANK_HEADER not in received.headers
    (arrived,) = gateway.neighbour.received
    assert {name: arrived.headers.get(name) for name in theirs} == theirs
    assert gateway.decoy.visits == 0
    assert not [name for name in ours.headers if name.startswith(contract.OWNED_PREFIX)]
