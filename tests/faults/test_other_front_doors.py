"""Clients cannot control routing behind a front door that does not remove their headers."""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest
import yaml

from dp_extproc import contract
from dp_extproc.envoy_config import build_bootstrap, render_yaml
from dp_extproc.lab.engine.api.faults import Fault, Kind
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import ext_proc, http_filters, load_gateway
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST
from faults.decoy import Decoy

CHAT: Final = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
STRIPPED: Final = ("x-dp-", "x-override-", "x-data-parallel-rank")
ATTEMPTS: Final = 6
"""Attempts with each kind of header; half as many failures eject an endpoint."""
LEAVES: Final = "envoy.filters.http.header_mutation"
"""The filter of the shipped example that removes the clients' headers."""


@dataclass(frozen=True)
class Fleet:
    """Two engines behind another front door."""

    workers: Sequence[HostedEngine]
    service: ServiceProcess
    client: httpx.Client

    def failures(self) -> list[str]:
        """List the failures in the service's metrics."""
        page = self.service.metrics()
        assert "# TYPE dp_extproc_endpoint_ejected" in page
        counters = ("dp_extproc_endpoint_ejected{", "dp_extproc_leg_failures_total{")
        return [line for line in page.splitlines() if line.startswith(counters) and not line.endswith(" 0.0")]

    def received(self) -> list[dict[str, Any]]:
        return [request for worker in self.workers for request in worker.requests()]


def forged_headers(victim: str, decoy: str) -> dict[str, str]:
    """List all headers with an internal meaning, with the address of a decoy, or of an endpoint to be ejected."""
    return {
        **dict.fromkeys(contract.SET_INSIDE, decoy),
        contract.AVOID: f"-,{victim},cut",
        contract.FAILED: f"-,{victim},cut",
        contract.RETRY: "1",
        contract.LEG: "1",
        contract.STAGE: contract.FIRST_EVENT,
        contract.WATCH: "1",
        contract.DESTINATION: decoy,
        "x-override-rid": "intruder",
        "x-override-routed-dp-rank": "1",
        "x-data-parallel-rank": "1",
        "x-envoy-original-dst-host": decoy,
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-retry-on": "5xx",
        "x-envoy-max-retries": "7",
        "x-envoy-original-path": "/other",
        "x-envoy-decorator-operation": "other",
    }


@pytest.fixture
def decoy() -> Iterator[Decoy]:
    decoy = Decoy()
    yield decoy
    decoy.close()


def run(running: ExitStack, protocol: str, **sections: Any) -> tuple[Sequence[HostedEngine], ServiceProcess]:
    engines = HostedEngines()
    workers = [engines.add("--dp-size", "2", *FAST) for _ in range(2)]
    running.enter_context(engines)
    pool = {"models": ["*"], "workers": {"endpoints": [each.url for each in workers]}}
    service = running.enter_context(ServiceProcess({**write_config([pool], **sections), "protocol": protocol}))
    service.wait_until_fresh()
    return workers, service


@pytest.fixture(params=["FULL_DUPLEX_STREAMED", "BUFFERED"])
def picked(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """A gateway that speaks the endpoint-picker protocol, removes no headers, and copies client headers to metadata."""
    with ExitStack() as running:
        workers, service = run(running, "endpoint_picker")
        gateway = load_gateway(service.config, [each.port for each in workers])
        filters = http_filters(gateway)
        filters[:] = [each for each in filters if each["name"] != LEAVES]
        settings = ext_proc(gateway)
        settings["processing_mode"]["request_body_mode"] = request.param
        settings["grpc_service"]["initial_metadata"] = [
            {"key": name, "value": f"%REQ({name})%"} for name in (contract.LEG, contract.STAGE, contract.OWNER)
        ]
        envoy = running.enter_context(EnvoyProcess(service.config, bootstrap=yaml.safe_dump(gateway)))
        yield Fleet(workers, service, running.enter_context(loopback.client(envoy.url)))


@pytest.fixture(params=["one attempt", "retries", "bare route", "another cluster"])
def routed(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """The printed block behind a listener that removes no headers.

    The bare route has nothing but a name of a cluster. The other cluster leads past that of the block.
    """
    with ExitStack() as running:
        attempts = 1 if request.param == "one attempt" else 3
        workers, service = run(running, "envoy", retry={"attempts": attempts}, envoy={"session_header": "x-session"})
        bootstrap = yaml.safe_load(render_yaml(build_bootstrap(service.config)))
        resources = bootstrap["static_resources"]
        manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        del manager["early_header_mutation_extensions"]
        (route,) = manager["route_config"]["virtual_hosts"][0]["routes"]
        cluster = "dp_dispatch"
        if request.param == "another cluster":
            (own,) = [copy.deepcopy(each) for each in resources["clusters"] if each["name"] == cluster]
            own["name"] = cluster = "of_a_team"
            del own["typed_extension_protocol_options"]
            resources["clusters"].append(own)
        if attempts > 1 and request.param != "retries":
            route.clear()
            route.update({"match": {"prefix": "/"}, "route": {"cluster": cluster}})
        envoy = running.enter_context(EnvoyProcess(service.config, bootstrap=yaml.safe_dump(bootstrap)))
        yield Fleet(workers, service, running.enter_context(loopback.client(envoy.url)))


def attack(fleet: Fleet, decoy: Decoy, paths: Sequence[tuple[str, str]], *, without: Collection[str] = ()) -> None:
    """Send requests that blame each endpoint in turn, and check that each was served like any other."""
    for worker in fleet.workers:
        forged = forged_headers(worker.url.removeprefix("http://"), decoy.address)
        headers = {name: value for name, value in forged.items() if name not in without}
        for method, path in [("POST", "/v1/chat/completions")] * ATTEMPTS + list(paths):
            answer = fleet.client.request(method, path, json=CHAT if method == "POST" else None, headers=headers)
            assert answer.status_code in {200, 400}, answer.text  # the stand-in has no other paths than chats here
            assert not {name for name in answer.headers if name.startswith("x-dp-")}
    fleet.service.wait_until_idle()

    assert decoy.visits == 0
    assert fleet.failures() == []
    received = fleet.received()
    chats = [each for each in received if each["path"] == "/v1/chat/completions"]
    assert len(chats) == ATTEMPTS * len(fleet.workers)
    assert [name for each in received for name in each["headers"] if name.startswith(STRIPPED)] == []


def test_a_client_controls_no_routing_behind_another_gateway(picked: Fleet, decoy: Decoy) -> None:
    """The service ignores these headers, and none reaches an engine, also on requests that pass unread."""
    attack(picked, decoy, [("POST", "/v1/embeddings"), ("GET", "/health"), ("GET", "/v1/models")])

    addresses = {each.url.removeprefix("http://") for each in picked.workers}
    assert {each["headers"][contract.DESTINATION] for each in picked.received()} <= addresses


def test_a_client_controls_no_routing_behind_another_listener(
    routed: Fleet, decoy: Decoy, request: pytest.FixtureRequest
) -> None:
    """The block removes the headers itself that only the router may set.

    Only its own cluster removes the list of failed endpoints, because that cluster also sets it.
    """
    past_the_cluster = "another cluster" in request.node.name
    attack(routed, decoy, [("GET", "/health")], without=(contract.AVOID,) if past_the_cluster else ())


@pytest.mark.parametrize("routed", ["retries", "bare route"], indirect=True)
def test_addresses_of_failed_engines_stay_in_the_block(routed: Fleet) -> None:
    """A route that removes no headers of responses lets no more through than the request for a retry."""
    for worker in routed.workers:
        worker.fault(inference=Fault(Kind.UNAVAILABLE))

    answer = routed.client.post("/v1/chat/completions", json=CHAT)

    assert answer.status_code == 503
    assert {name for name in answer.headers if name.startswith("x-dp-")} <= {contract.RETRY, contract.REASON_HEADER}
    ports = [str(worker.port) for worker in routed.workers]
    assert [value for value in answer.headers.values() if any(port in value for port in ports)] == []
