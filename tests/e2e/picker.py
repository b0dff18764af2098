"""Gateways of the example for prefill and decode, in each mode of bodies: one Envoy, with a listener for each mode."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx
import yaml

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import ext_proc_of, load_gateway
from e2e.stack import FAST, Stack, pool_of, start_engines

EXAMPLE: Final = "endpoint-picker-pd.yaml"
_BUFFER: Final = 4 << 20
"""Bytes that the listener buffers where request bodies are buffered; Envoy's default is 1 MiB."""
_ORIGINAL_DST: Final = """
name: decode
type: ORIGINAL_DST
lb_policy: CLUSTER_PROVIDED
original_dst_lb_config: {use_http_header: true, http_header_name: x-gateway-destination-endpoint}
"""


@dataclass(frozen=True)
class Mode:
    """How a gateway calls the service, and routes."""

    request: str = "FULL_DUPLEX_STREAMED"
    response: str = "NONE"
    by_header: bool = False
    """Whether the cluster dials the address in the header, and has no endpoints of its own."""
    headers: str = "SEND"
    """Mode of response headers."""
    service: int = 0
    """Index of the service."""
    message_timeout: str = "20s"

    def __str__(self) -> str:
        routing = "original_dst" if self.by_header else "override_host"
        return f"{self.request}-{self.response}-{routing}-{self.headers}"


@dataclass(frozen=True)
class Gateways:
    """The gateways, one for each mode, in front of one fleet."""

    stack: Stack
    clients: Mapping[Mode, httpx.Client]
    services: Sequence[ServiceProcess]

    def of(self, mode: Mode) -> Stack:
        """Give the fleet behind one of the gateways."""
        stack = self.stack
        service = self.services[mode.service]
        return Stack(stack.prefills, stack.decodes, service, stack.envoy, self.clients[mode], stack.version)


@contextmanager
def run_gateways(
    modes: Sequence[Mode],
    sections: Sequence[dict[str, Any]] = ({},),
    *,
    prefills: int = 1,
    decodes: int = 1,
    options: Sequence[str] = FAST,
    **of_pool: Any,
) -> Iterator[Gateways]:
    """Run engines, a service for each of *sections*, and one Envoy; at the end no reservation may be left."""
    flags = ("--dp-attention", *options)
    with ExitStack() as running:
        prefill, decode = start_engines(running, prefills, decodes, *flags)
        pool = pool_of(prefill, decode) | of_pool
        services = [
            running.enter_context(
                ServiceProcess({**write_config([pool], **copy.deepcopy(each)), "protocol": "endpoint_picker"})
            )
            for each in sections
        ]
        bootstrap, ports = _build(modes, services, [each.port for each in decode])
        envoy = running.enter_context(EnvoyProcess(services[0].config, bootstrap=bootstrap))
        clients = {
            mode: running.enter_context(loopback.client(f"http://127.0.0.1:{port}", timeout=60))
            for mode, port in zip(modes, ports, strict=True)
        }
        for service in services:
            service.wait_until_fresh()
            service.wait_until_ready()
        version = (0, 5, 23)
        yield Gateways(Stack(prefill, decode, services[0], envoy, clients[modes[0]], version), clients, services)
        for service in services:
            if service.is_running:
                service.wait_until_idle()


def _build(
    modes: Sequence[Mode], services: Sequence[ServiceProcess], decodes: Sequence[int]
) -> tuple[str, Sequence[int]]:
    """Build an Envoy with a listener for each mode, and return its configuration and their ports."""
    whole = load_gateway(services[0].config, decodes, EXAMPLE)
    resources = whole["static_resources"]
    listener, (picker, cluster) = resources["listeners"][0], resources["clusters"]
    resources["listeners"], resources["clusters"] = [], []
    ports = free_ports(len(modes))
    for index, (mode, port) in enumerate(zip(modes, ports, strict=True)):
        own = copy.deepcopy(listener)
        own["name"] = str(index)
        if mode.request == "BUFFERED":
            own["per_connection_buffer_limit_bytes"] = _BUFFER
        own["address"]["socket_address"]["port_value"] = port
        manager = own["filter_chains"][0]["filters"][0]["typed_config"]
        manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["cluster"] = f"decode{index}"
        settings = ext_proc_of(manager["http_filters"])
        settings["grpc_service"]["envoy_grpc"]["cluster_name"] = f"picker{index}"
        settings["processing_mode"].update(
            request_body_mode=mode.request, response_body_mode=mode.response, response_header_mode=mode.headers
        )
        if mode.headers == "SKIP":
            settings["processing_mode"]["response_trailer_mode"] = "SKIP"
        settings["message_timeout"] = mode.message_timeout
        resources["listeners"].append(own)
        to_decode = yaml.safe_load(_ORIGINAL_DST) if mode.by_header else copy.deepcopy(cluster)
        to_service = copy.deepcopy(picker)
        for name, each in ((f"decode{index}", to_decode), (f"picker{index}", to_service)):
            each["name"] = name
            if "load_assignment" in each:
                each["load_assignment"]["cluster_name"] = name
            resources["clusters"].append(each)
        grpc = services[mode.service].config.listen.grpc.port
        endpoints = to_service["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoints[0]["endpoint"]["address"]["socket_address"]["port_value"] = grpc
        # Each gateway is another instance for the service.
        source = {"address": f"127.0.1.{index + 1}", "port_value": 0}
        to_service["upstream_bind_config"] = {"source_address": source}
    return yaml.safe_dump(whole), ports
