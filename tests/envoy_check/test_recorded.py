"""Envoys that Istio and Envoy Gateway have configured, as their runs recorded them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_check import Finding, Severity
from envoy_check.samples import ADMIN, Tree, found_in
from envoy_config.harness import MAX_BODY_BYTES, POOLS, make_config
from envoy_config.recorded_gateway import Resources, bootstrap_of
from envoy_config.test_envoy_gateway import resources_of

ISTIO: Final = Path(__file__).parents[1] / "envoy_config" / "recorded" / "istio"
OUR_HOST: Final = "llm.example.com:80"


def delivered(kind: str) -> Tree:
    found: Tree = json.loads((ISTIO / f"{kind}.json").read_text(encoding="utf-8"))["delivered"]
    return found


def dump(resources: Tree) -> Tree:
    """Return the page /config_dump with resources of a control plane."""
    return {
        "configs": [
            {"@type": f"{ADMIN}.ListenersConfigDump", "dynamic_listeners": [
                {"name": each["name"], "active_state": {"listener": each}} for each in resources["dynamic_listeners"]
            ]},
            {"@type": f"{ADMIN}.ClustersConfigDump", "dynamic_active_clusters": [
                {"cluster": each} for each in resources["dynamic_active_clusters"]
            ]},
            {"@type": f"{ADMIN}.RoutesConfigDump", "dynamic_route_configs": [
                {"route_config": each} for each in resources["dynamic_route_configs"]
            ]},
        ]
    }  # fmt: skip


def config_of(resources: Tree) -> Config:
    """Return the configuration of a recording. The address of the service was one of that run."""
    service = next(each for each in resources["dynamic_active_clusters"] if each["name"] == "extproc")
    member = service["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    return Config.model_validate(
        {
            "envoy": {
                "max_body_bytes": MAX_BODY_BYTES,
                "service": f"{member['address']}:{member['port_value']}",
            },
            "pools": [POOLS[BodyMode.BUFFERED]],
        }
    )


def errors(found: list[Finding]) -> list[str]:
    return [each.code for each in found if each.severity is Severity.ERROR]


def our_route(resources: Tree) -> Tree:
    hosts = [host for table in resources["dynamic_route_configs"] for host in table["virtual_hosts"]]
    found: Tree = next(host for host in hosts if host["name"] == OUR_HOST)["routes"][0]
    return found


def _without_cluster(name: str) -> Callable[[Tree], object]:
    def change(resources: Tree) -> None:
        clusters = resources["dynamic_active_clusters"]
        clusters[:] = [each for each in clusters if each["name"] != name]

    return change


CHANGES: Final[dict[str, tuple[Callable[[Tree], Any], str]]] = {
    "retries of the mesh": (
        lambda found: our_route(found)["route"].update({"retry_policy": {"retry_on": "connect-failure,unavailable"}}),
        "retry_policy_ineffective",
    ),
    "no removals": (lambda found: our_route(found).pop("response_headers_to_remove"), "response_headers_kept"),
    "no buffer": (lambda found: our_route(found).pop("request_body_buffer_limit"), "buffer_limit"),
    "another route": (lambda found: our_route(found)["route"].update({"cluster": "BlackHoleCluster"}), "no_entrance"),
    "no cluster": (_without_cluster("decode_server"), "cluster_missing"),
}


@pytest.mark.parametrize("kind", ["shared", "shared-api"])
def test_what_istio_delivers_has_no_errors(kind: str) -> None:
    """Its connection manager has no limits for slow clients, which is a warning."""
    resources = delivered(kind)

    found = found_in(config_of(resources), dump(resources))

    assert errors(found) == []
    assert {"no_request_timeouts", "delayed_close"} <= {each.code for each in found}


@pytest.mark.parametrize("change", CHANGES)
def test_what_istio_would_deliver_without_a_patch_is_found(change: str) -> None:
    """Istio ignores a patch whose place it does not find, without a word to its author."""
    apply, code = CHANGES[change]
    resources = delivered("shared")
    config = config_of(resources)
    apply(resources)

    assert errors(found_in(config, dump(resources))) == [code]


GENERATED: Final = "httproute/default/dp-extproc/rule/0"
"""The cluster that Envoy Gateway makes of the rule, and a patch replaces."""


def generated_route(resources: Resources) -> Tree:
    """Return the route that Envoy Gateway makes of the rule."""
    tables = [
        each["default_filter_chain"]["filters"][0]["typed_config"]["route_config"]
        for each in resources["listeners"]
        if "default_filter_chain" in each
    ]
    routes = [route for table in tables for host in table["virtual_hosts"] for route in host["routes"]]
    found: Tree = next(each for each in routes if each["route"]["cluster"] == GENERATED)
    return found


def _without(kind: str, name: str) -> Callable[[Resources], object]:
    def change(resources: Resources) -> None:
        resources[kind][:] = [each for each in resources[kind] if each["name"] != name]

    return change


def _breakers_of_gateway(resources: Resources) -> None:
    cluster = next(each for each in resources["clusters"] if each["name"] == GENERATED)
    cluster["circuit_breakers"] = {"thresholds": [{"max_retries": 1024}]}


LOST_PATCHES: Final[dict[str, tuple[Callable[[Resources], object], str]]] = {
    "retries": (lambda found: generated_route(found)["route"].pop("retry_policy"), "retry_policy_missing"),
    "buffer": (lambda found: generated_route(found).pop("request_body_buffer_limit"), "buffer_limit"),
    "timeout": (lambda found: generated_route(found)["route"].pop("timeout"), "route_timeout"),
    "breakers": (_breakers_of_gateway, "circuit_breakers"),
    "listener": (_without("listeners", "prefill_leg"), "listener_missing"),
    "cluster": (_without("clusters", "extproc_owner"), "cluster_missing"),
}


@pytest.mark.parametrize("lost", LOST_PATCHES)
def test_patch_that_envoy_gateway_did_not_apply_is_found(lost: str) -> None:
    """It drops the patches that it cannot apply, and applies the others of the same policy."""
    apply, code = LOST_PATCHES[lost]
    config = make_config(BodyMode.BUFFERED, [1, 2, 3])
    resources = resources_of(config, "127.0.0.1:4")
    apply(resources)

    assert errors(found_in(config, bootstrap_of(config, resources, {}))) == [code]
