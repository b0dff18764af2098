"""Reads what a control plane has delivered to an Envoy, compares and records it, so that a test needs no Go."""

import copy
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
    patches = patches_of(ours)
    names = {patch["patch"]["value"]["name"] for patch in patches}
    virtual = {patch["match"]["routeConfiguration"]["vhost"]["name"] for patch in patches if _is_route(patch)}
    kept: Delivered = copy.deepcopy(resources)
    for key, items in kept.items():
        kept[key] = [each for each in items if each["name"] not in names]
    for routes in kept["dynamic_route_configs"]:
        routes["virtual_hosts"] = [each for each in routes["virtual_hosts"] if each["name"] not in virtual]
    return kept


def differences(resources: Delivered, ours: list[Resource]) -> list[str]:
    """Name the clusters and listeners of an ``EnvoyFilter`` that were not delivered as they were printed."""
    items = (*resources["dynamic_listeners"], *resources["dynamic_active_clusters"])
    found = [{key: value for key, value in each.items() if key != "@type"} for each in items]
    added = [patch["patch"]["value"] for patch in patches_of(ours) if patch["applyTo"] in {"CLUSTER", "LISTENER"}]
    return [value["name"] for value in added if value not in found]


def patches_of(ours: list[Resource]) -> list[dict[str, Any]]:
    """Return the patches of the ``EnvoyFilter`` among resources."""
    (patches,) = (each["spec"]["configPatches"] for each in ours if each["kind"] == "EnvoyFilter")
    return list(patches)


def _is_route(patch: dict[str, Any]) -> bool:
    return bool(patch["applyTo"] == "HTTP_ROUTE")


def record(path: Path, ours: list[Resource], resources: Delivered) -> None:
    """Write the printed resources without what was delivered as printed, and everything that was delivered."""
    printed = copy.deepcopy(ours)
    for patch in patches_of(printed):
        patch["patch"]["value"] = {"name": patch["patch"]["value"]["name"]}
    text = json.dumps({"printed": printed, "delivered": resources}, separators=(",", ":"), sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
