"""The shipped example of an endpoint-picker gateway, with the ports of a test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dp_extproc.config import Config

EXAMPLES = Path(__file__).parents[2] / "envoy"


def load_gateway(config: Config, engines: Sequence[int], example: str = "endpoint-picker.yaml") -> dict[str, Any]:
    """Read an example and set its ports: those of Envoy and the service from *config*, and those of the engines."""
    content: dict[str, Any] = yaml.safe_load((EXAMPLES / example).read_text(encoding="utf-8"))
    resources = content["static_resources"]
    picker, cluster = resources["clusters"]
    resources["listeners"][0]["address"]["socket_address"]["port_value"] = config.envoy.inference.port
    content["admin"]["address"]["socket_address"]["port_value"] = config.envoy.admin.port
    _set_ports(picker, [config.listen.grpc.port])
    _set_ports(cluster, engines)
    return content


def http_filters(gateway: dict[str, Any]) -> list[dict[str, Any]]:
    """List the HTTP filters that each request passes."""
    manager = gateway["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    found: list[dict[str, Any]] = manager["http_filters"]
    return found


def ext_proc(gateway: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the filter that calls the service."""
    return ext_proc_of(http_filters(gateway))


def ext_proc_of(filters: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of the filter that calls the service, of a list of filters."""
    (found,) = [each["typed_config"] for each in filters if each["name"].endswith("ext_proc")]
    settings: dict[str, Any] = found
    return settings


def _set_ports(cluster: dict[str, Any], ports: Sequence[int]) -> None:
    endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    del endpoints[len(ports) :]
    for endpoint, port in zip(endpoints, ports, strict=True):
        endpoint["endpoint"]["address"]["socket_address"]["port_value"] = port
