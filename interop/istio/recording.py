"""Reads what a control plane has delivered to an Envoy, compares and records it, so that a test needs no Go."""

import json
from pathlib import Path
from typing import Any, Final

from dp_extproc.lab.testbed import loopback
from interop.istio.gateways import Resource

Delivered = dict[str, list[dict[str, Any]]]
"""Resources of Envoy by their key in :data:`PLACES`."""

PLACES: Final = {
    "dynamic_listeners": ("active_state", "listener"),
    "dynamic_active_clusters": ("cluster",),
    "dynamic_route_configs": ("route_config",),
}
"""The lists of Envoy's page ``/config_dump`` that have delivered resources, and where each item has the resource."""


def delivered(admin_url: str) -> Delivered:
    """Read the resources that Envoy has, in the order of their names."""
    page = loopback.CLIENT.get(f"{admin_url}/config_dump").raise_for_status().json()
    found: Delivered = {key: [] for key in PLACES}
    for config in page["configs"]:
        for key, way in PLACES.items():
            for item in config.get(key, ()):
                for name in way:
                    item = item[name]  # noqa: PLW2901 - goes down to the resource
                found[key].append(item)
    return {key: sorted(items, key=lambda each: str(each["name"])) for key, items in found.items()}


def without_ours(resources: Delivered, ours: list[Resource]) -> Delivered:
    """Leave out what an ``EnvoyFilter`` has added, and the virtual hosts of our host names."""
    (spec,) = (each["spec"] for each in ours if each["kind"] == "EnvoyFilter")
    values = [patch["patch"]["value"]["name"] for patch in spec["configPatches"]]
    virtual = [
        patch["match"].get("routeConfiguration", {}).get("vhost", {}).get("name") for patch in spec["configPatches"]
    ]
    kept: Delivered = json.loads(json.dumps(resources))
    for key, items in kept.items():
        kept[key] = [each for each in items if each["name"] not in values]
    for listener in kept["dynamic_listeners"]:
        for manager in connection_managers(listener):
            manager["http_filters"] = [each for each in manager["http_filters"] if each["name"] not in values]
    for routes in kept["dynamic_route_configs"]:
        routes["virtual_hosts"] = [each for each in routes["virtual_hosts"] if each["name"] not in virtual]
    return kept


def connection_managers(listener: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the HTTP connection managers of a listener."""
    chains = [*listener.get("filter_chains", ()), *filter(None, [listener.get("default_filter_chain")])]
    configs = [each["typed_config"] for chain in chains for each in chain["filters"]]
    return [each for each in configs if "http_filters" in each]


def record(path: Path, ours: list[Resource], resources: Delivered) -> None:
    """Write the printed resources, and what the control plane has delivered with them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"printed": ours, "delivered": resources}, separators=(",", ":"), sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
