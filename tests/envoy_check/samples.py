"""Configurations of Envoy that tests change: as a bootstrap, and as the dump of an Envoy that runs."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from dp_extproc.config import Config, parse_config
from dp_extproc.envoy_check import Finding, audit
from dp_extproc.envoy_check.snapshot import read_snapshot
from dp_extproc.envoy_config import build_bootstrap
from dp_extproc.envoy_config.yaml_text import plain

EXAMPLES: Final = Path(__file__).parents[2] / "envoy"
ADMIN: Final = "type.googleapis.com/envoy.admin.v3"
POOL: Final[Mapping[str, Any]] = {
    "models": ["*"],
    "prefill": {"endpoints": ["http://127.0.0.1:1"]},
    "decode": {"endpoints": ["http://127.0.0.1:2"]},
}
Tree = dict[str, Any]
Change = Callable[[Tree], object]


def config_with(**sections: Any) -> Config:
    return Config.model_validate({"pools": [POOL], **sections})


@cache
def example_config() -> Config:
    return parse_config((EXAMPLES / "dp-extproc.yaml").read_text(encoding="utf-8"))


def bootstrap_of(config: Config) -> Tree:
    """Return the printed bootstrap as mappings and lists, which a test may change."""
    if config is example_config():
        return deepcopy(_example_bootstrap())
    return plain(build_bootstrap(config))  # type: ignore[no-any-return]


@cache
def _example_bootstrap() -> Tree:
    return plain(build_bootstrap(example_config()))  # type: ignore[no-any-return]


def dump_of(bootstrap: Tree, *, dynamic: bool = False, version: tuple[int, int, int] = (1, 40, 0)) -> Tree:
    """Return the page ``/config_dump`` of an Envoy with a bootstrap, or with its resources from a control plane."""
    static = bootstrap["static_resources"]
    listeners, clusters = (
        [{"@type": f"type.googleapis.com/envoy.config.{kind.lower()}.v3.{kind}", **each} for each in static[key]]
        for kind, key in (("Listener", "listeners"), ("Cluster", "clusters"))
    )
    numbers = dict(zip(("major_number", "minor_number", "patch"), version, strict=True))
    node = {"user_agent_name": "envoy", "user_agent_build_version": {"version": numbers}}
    if dynamic:
        of_listeners = {
            "dynamic_listeners": [{"name": each["name"], "active_state": {"listener": each}} for each in listeners]
        }
        of_clusters = {"dynamic_active_clusters": [{"version_info": "1", "cluster": each} for each in clusters]}
    else:
        of_listeners = {"static_listeners": [{"listener": each} for each in listeners]}
        of_clusters = {"static_clusters": [{"cluster": each} for each in clusters]}
    return {
        "configs": [
            {"@type": f"{ADMIN}.BootstrapConfigDump", "bootstrap": {"node": node, **bootstrap}},
            {"@type": f"{ADMIN}.ClustersConfigDump", **of_clusters},
            {"@type": f"{ADMIN}.ListenersConfigDump", **of_listeners},
            {"@type": f"{ADMIN}.RoutesConfigDump"},
        ]
    }


def section(dump: Tree, kind: str) -> Tree:
    found: Tree = next(each for each in dump["configs"] if each["@type"] == f"{ADMIN}.{kind}")
    return found


def found_in(config: Config, *documents: Any) -> list[Finding]:
    return audit(read_snapshot(documents), config)


def codes(findings: list[Finding]) -> list[str]:
    return [each.code for each in findings]


def listener(bootstrap: Tree, name: str) -> Tree:
    found: Tree = next(each for each in bootstrap["static_resources"]["listeners"] if each["name"] == name)
    return found


def cluster(bootstrap: Tree, name: str) -> Tree:
    found: Tree = next(each for each in bootstrap["static_resources"]["clusters"] if each["name"] == name)
    return found


def manager(bootstrap: Tree, name: str = "inference") -> Tree:
    """Return the connection manager of a listener."""
    found: Tree = listener(bootstrap, name)["filter_chains"][0]["filters"][-1]["typed_config"]
    return found


def route(bootstrap: Tree) -> Tree:
    """Return the route of the front door into the block."""
    found: Tree = manager(bootstrap)["route_config"]["virtual_hosts"][0]["routes"][0]
    return found


def http_filter(owner: Tree, name: str) -> Tree:
    """Return the settings of an HTTP filter of a connection manager or a cluster."""
    if "typed_extension_protocol_options" in owner:
        (owner,) = owner["typed_extension_protocol_options"].values()
    found: Tree = next(each for each in owner["http_filters"] if each["name"] == name)["typed_config"]
    return found


def load(path: Path) -> Tree:
    found: Tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found
