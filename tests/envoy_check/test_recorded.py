"""Envoys that Istio has configured, as ``make istio-run`` recorded them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_check import Finding, Severity
from envoy_check.samples import ADMIN, Tree, found_in
from envoy_config.harness import MAX_BODY_BYTES, POOLS

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
