"""Records what Istio makes of the printed resources, so that a test needs no Go."""

import json
from pathlib import Path
from typing import Any, Final

from dp_extproc.lab.testbed import loopback
from interop.istio.gateways import Resource

_DELIVERED: Final = {
    "Listeners": ("dynamic_listeners", ("active_state", "listener")),
    "Clusters": ("dynamic_active_clusters", ("cluster",)),
    "Routes": ("dynamic_route_configs", ("route_config",)),
}
"""Section of Envoy's page ``/config_dump`` by the last part of its type, and where a resource is in each item."""


def record(path: Path, admin_url: str, ours: list[Resource]) -> None:
    """Write the page ``/config_dump`` without what differs from run to run, and the resources that led to it."""
    page = loopback.CLIENT.get(f"{admin_url}/config_dump").raise_for_status().json()
    configs = [_scrubbed(each) for each in page["configs"] if _section(each) in _DELIVERED]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"resources": ours, "configs": configs}, separators=(",", ":"), sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _scrubbed(config: dict[str, Any]) -> dict[str, Any]:
    delivered, way = _DELIVERED[_section(config)]
    return {"@type": config["@type"], delivered: [_nested(each, way) for each in config[delivered]]}


def _nested(item: dict[str, Any], way: tuple[str, ...]) -> dict[str, Any]:
    """Keep a resource in an item at its place, without times and versions beside it."""
    name, *rest = way
    inner = _nested(item[name], tuple(rest)) if rest else item[name]
    return {key: item[key] for key in ("name",) if key in item} | {name: inner}


def _section(config: dict[str, Any]) -> str:
    return str(config["@type"]).rpartition(".")[2].removesuffix("ConfigDump")
