"""Runs what the control plane of a gateway has delivered, with the present print in the places of the recorded one."""

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from dp_extproc import contract
from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_check import Finding, audit
from dp_extproc.envoy_check.reader import read_envoy
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from envoy_config.harness import BODY, make_config
from envoy_config.recording_engine import RecordingEngine, run_engine
from envoy_config.scripted_service import ScriptedService, run_service
from faults.decoy import Decoy
from faults.test_other_front_doors import forged_headers

HOST: Final = "llm.example.com"
NEIGHBOUR: Final = "other.example.com"
"""The host of another team on the recorded gateways."""

Resources = dict[str, list[dict[str, Any]]]
"""Listeners and clusters of a bootstrap."""


def recorded(name: str) -> dict[str, Any]:
    """Read the printed resources of a recording, and what was delivered."""
    path = Path(__file__).parent / "recorded" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


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


@contextmanager
def run_recorded(resources: Callable[[Config, str], Resources], extension: dict[str, Any]) -> Iterator[Gateway]:
    """Run an Envoy.

    Args:
        resources: Makes its static resources, given the configuration and the address of the neighbour's engine.
        extension: Content of the bootstrap extension, as the gateway has it.
    """
    ports = free_ports(3)
    config = make_config(BodyMode.BUFFERED, ports)
    with ExitStack() as running:
        prefill, decode, neighbour = (
            running.enter_context(run_engine(name)) for name in ("prefill", "decode", "other")
        )
        service = running.enter_context(run_service(prefill.address, decode.address, ports[2]))
        bootstrap = bootstrap_of(config, resources(config, neighbour.address), extension)
        envoy = running.enter_context(EnvoyProcess(config, bootstrap=json.dumps(bootstrap)))
        client = running.enter_context(loopback.client(envoy.url))
        decoy = Decoy()
        running.callback(decoy.close)
        yield Gateway(client, envoy, service, prefill, decode, neighbour, decoy)


def bootstrap_of(config: Config, resources: Resources, extension: dict[str, Any]) -> dict[str, Any]:
    """Build the bootstrap of an Envoy with these resources."""
    internal = "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener"
    return {
        "static_resources": _without_types(resources),
        "bootstrap_extensions": [
            {"name": "envoy.bootstrap.internal_listener", "typed_config": {"@type": internal, **extension}}
        ],
        "admin": {"address": {"socket_address": address_of(str(config.envoy.admin))}},
    }


def check(bootstrap: dict[str, Any], config: Config, folder: Path) -> list[Finding]:
    """Return what ``dp-extproc check --envoy`` finds."""
    path = folder / "gateway.json"
    path.write_text(json.dumps(bootstrap), encoding="utf-8")
    return audit(asyncio.run(read_envoy([str(path)])), config)


def address_of(text: str) -> dict[str, Any]:
    """Write an address as Envoy has it."""
    host, _, port = text.rpartition(":")
    return {"address": host, "port_value": int(port)}


def static_cluster(cluster: dict[str, Any], engine: str) -> dict[str, Any]:
    """Give a cluster one endpoint instead of those that a control plane would deliver."""
    kept = {key: value for key, value in cluster.items() if key != "eds_cluster_config"}
    endpoint = {"endpoint": {"address": {"socket_address": address_of(engine)}}}
    assignment = {"cluster_name": cluster["name"], "endpoints": [{"lb_endpoints": [endpoint]}]}
    return {**kept, "type": "STATIC", "load_assignment": assignment}


def check_hosts(gateway: Gateway) -> None:
    """Check that both legs arrive, that forged headers have no effect, and that the other host is as ever."""
    headers = forged_headers("127.0.0.1:1", gateway.decoy.address)
    ours = gateway.client.post("/v1/completions", content=BODY, headers={**headers, "host": HOST})
    theirs = {name: value for name, value in headers.items() if not name.startswith("x-envoy-")}
    other = gateway.client.post("/any", content=BODY, headers={**headers, "host": NEIGHBOUR})

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


def _without_types(resources: Resources) -> Resources:
    """Remove the types that delivered resources have, and those inside a bootstrap have not."""
    resources = copy.deepcopy(resources)
    for items in resources.values():
        for each in items:
            each.pop("@type", None)
            for chain in (*each.get("filter_chains", ()), each.get("default_filter_chain", {})):
                for each_filter in chain.get("filters", ()):
                    each_filter["typed_config"].get("route_config", {}).pop("@type", None)
    return resources
