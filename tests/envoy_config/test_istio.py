"""Istio's form, with what Istio's control plane made of it on real gateways (``make istio-run``), without Go.

Istio delivers clusters and listeners as they are printed, which the run compares. So the recorded print has only their
names, and a test puts the present print into the places of the delivered ones.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_check import Severity
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats.target import ObjectName, Target
from envoy_config.harness import make_config
from envoy_config.recorded_gateway import (
    Gateway,
    Resources,
    address_of,
    bootstrap_of,
    check,
    check_hosts,
    recorded,
    run_recorded,
    static_cluster,
)

TARGETS: Final = {
    "shared": Target(
        ObjectName("istio-ingress", "shared"), ("llm.example.com",), 80, (), (("istio", "ingressgateway"),)
    ),
    "shared-api": Target(ObjectName("istio-ingress", "shared-api"), ("llm.example.com",), 80),
}
"""What the command line gave for each recording: a gateway of Istio's API, and one of the Gateway API."""
EXTENSION: Final = {"buffer_size_kb": 64}
"""The bootstrap extension as Istio's proxy has it."""
_BACKEND: Final = "outbound|80||backend.internal"


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

    assert resources == recorded(f"istio/{kind}")["printed"]


@pytest.mark.parametrize("kind", TARGETS)
def test_printed_names_were_delivered_once(kind: str) -> None:
    """Istio drops the second cluster of a name."""
    delivered = recorded(f"istio/{kind}")["delivered"]
    for key, part in (("dynamic_active_clusters", "CLUSTER"), ("dynamic_listeners", "LISTENER")):
        names = [each["name"] for each in delivered[key]]
        ours = [
            patch["patch"]["value"]["name"]
            for patch in patches_of(recorded(f"istio/{kind}")["printed"])
            if patch["applyTo"] == part
        ]
        assert len(ours) >= 3
        assert {names.count(name) for name in ours} == {1}


@pytest.fixture(params=TARGETS)
def gateway(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    def resources(config: Config, neighbour: str) -> Resources:
        return _resources(request.param, config, neighbour)

    with run_recorded(resources, EXTENSION) as gateway:
        yield gateway


@pytest.mark.parametrize("kind", TARGETS)
def test_check_accepts_a_recorded_gateway(kind: str, tmp_path: Path) -> None:
    """What Istio leaves at its own values is a warning at most, and the block is as it should be."""
    config = make_config(BodyMode.BUFFERED, [1, 2, 3])
    findings = check(bootstrap_of(config, _resources(kind, config, "127.0.0.1:4"), EXTENSION), config, tmp_path)

    assert {each.severity for each in findings} == {Severity.WARNING}
    assert {each.code for each in findings} == {"client_headers_kept", "delayed_close", "no_request_timeouts"}


def _resources(kind: str, config: Config, neighbour: str) -> Resources:
    """Build static resources from what was delivered, with the present print in the places of the recorded one."""
    delivered = recorded(f"istio/{kind}")["delivered"]
    ours = patches_of(printed(config, TARGETS[kind]))

    def present(part: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        values = {each["patch"]["value"]["name"]: each["patch"]["value"] for each in ours if each["applyTo"] == part}
        return [values.get(each.get("name"), each) for each in items]

    (routes,) = delivered["dynamic_route_configs"]
    for virtual_host in routes["virtual_hosts"]:
        virtual_host["routes"] = present("HTTP_ROUTE", virtual_host["routes"])
    listeners = present("LISTENER", delivered["dynamic_listeners"])
    for listener in listeners:
        if "internal_listener" not in listener:
            listener["address"]["socket_address"] = address_of(str(config.envoy.inference))
            manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
            del manager["rds"]
            manager["route_config"] = routes
    clusters = present("CLUSTER", delivered["dynamic_active_clusters"])
    return {
        "listeners": listeners,
        "clusters": [
            static_cluster(each, neighbour) if each["name"] == _BACKEND else each
            for each in clusters
            if each["name"] == _BACKEND or each.get("type") != "EDS"
        ],
    }


def test_recorded_gateway_leads_our_host_into_the_block_alone(gateway: Gateway) -> None:
    """Both legs arrive, forged headers have no effect, and the other host of the gateway gets its headers untouched."""
    check_hosts(gateway)
