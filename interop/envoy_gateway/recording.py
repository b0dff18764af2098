"""Compares what Envoy Gateway has delivered with what was printed, and records it, so that a test needs no Go."""

import copy
import json
from pathlib import Path
from typing import Any

from interop.istio.recording import Delivered

Resource = dict[str, Any]


def whole_resources(ours: list[Resource]) -> list[dict[str, Any]]:
    """Return the clusters and listeners that the printed policy brings. Some of both kinds share a name."""
    (patches,) = (each["spec"]["jsonPatches"] for each in ours if each["kind"] == "EnvoyPatchPolicy")
    return [each["operation"]["value"] for each in patches if not each["operation"]["path"]]


def differences(resources: Delivered, ours: list[Resource]) -> list[str]:
    """Name the clusters and listeners that were not delivered as they were printed."""
    items = (*resources["dynamic_listeners"], *resources["dynamic_active_clusters"])
    found = [{key: value for key, value in each.items() if key != "@type"} for each in items]
    return [value["name"] for value in whole_resources(ours) if value not in found]


def record(path: Path, ours: list[Resource], resources: Delivered) -> None:
    """Write what was printed and delivered. Of what was delivered as printed only the names are kept."""
    printed, names = copy.deepcopy(ours), {each["name"] for each in whole_resources(ours)}
    for each in whole_resources(printed):
        for key in each.keys() - {"name"}:
            del each[key]
    kept = {
        key: [{"name": each["name"]} if each["name"] in names else each for each in items]
        for key, items in resources.items()
    }
    text = json.dumps({"printed": printed, "delivered": kept}, separators=(",", ":"), sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="utf-8")
