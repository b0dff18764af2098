"""Files of listeners, clusters and routes that Envoy reads again whenever one of them is replaced."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml
from betterproto2 import Message
from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.listener.v3 import Listener
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm

from dp_extproc.config import Config
from dp_extproc.envoy_config.block import build_block, build_bootstrap_extension
from dp_extproc.envoy_config.clusters import build_collectors
from dp_extproc.envoy_config.formats.target import Target
from dp_extproc.envoy_config.front_door import build_front_door, build_routes, to_listen_on
from dp_extproc.envoy_config.yaml_text import commented, pack, render_yaml, unpack

BOOTSTRAP: Final = "bootstrap.yaml"
ROUTES: Final = "rds.yaml"
LISTENERS: Final = "lds.yaml"
CLUSTERS: Final = "cds.yaml"

_DIGITS: Final = 8
"""Hexadecimal digits of a generation. Two blocks get the same names once in 4 billion changes."""

_BOOTSTRAP: Final = """\
Start Envoy in the directory of these files: envoy -c bootstrap.yaml

It reads this file once. It reads the others again when they are replaced by rename. See docs/mesh/envoy.md.
"""
_KEPT: Final = "# Kept for requests that began before the change. No route leads here any more.\n"


def files(config: Config, _: Target) -> dict[str, str]:
    """Return a bootstrap and the files that it names, in the order in which to replace these.

    All names of the block begin with a hash of its content. So a changed block stands beside the one that it replaces,
    and only the route of the front door changes. The front door keeps its name, and so do its collectors.
    Envoy ends the streams of a changed listener after its drain time,
    and mirrored requests and calls of the service at once if their cluster changes.
    """
    generation = hashlib.sha256()
    of_any_generation = build_block(config)
    for each in (*of_any_generation.listeners, *of_any_generation.clusters):
        generation.update(bytes(each))
    prefix = f"{config.envoy.name_prefix}{generation.hexdigest()[:_DIGITS]}-"
    named = config.model_copy(update={"envoy": config.envoy.model_copy(update={"name_prefix": prefix})})
    block = build_block(named)
    front_door = build_front_door(config)
    _take_routes_from_file(front_door)
    routes = build_routes(named)
    routes.name = front_door.name
    return {
        BOOTSTRAP: render_yaml(_build_bootstrap(config)),
        CLUSTERS: _render([*block.clusters, *build_collectors(config)]),
        LISTENERS: _render([front_door, *block.listeners]),
        ROUTES: _render([routes]),
    }


def keep(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Return the new files with the blocks of the old ones, whose requests may last.

    Raises:
        ValueError: The old files are not of this form.
    """
    return {**new, CLUSTERS: _with_others(old, new, CLUSTERS), LISTENERS: _with_others(old, new, LISTENERS)}


def names(file: str, text: str) -> list[str]:
    """List the names of the resources in a file.

    Raises:
        ValueError: The text is not of this form.
    """
    return [each["name"] for each in _resources(file, text)]


def used_names(file: str, text: str) -> list[str]:
    """List the names by which Envoy shows that it uses a file: those of its resources, or the cluster of the route.

    Raises:
        ValueError: The text is not of this form.
    """
    if file != ROUTES:
        return names(file, text)
    return [
        route["route"]["cluster"]
        for table in _resources(file, text)
        for host in table["virtual_hosts"]
        for route in host["routes"]
    ]


def _with_others(old: Mapping[str, str], new: Mapping[str, str], file: str) -> str:
    renewed = names(file, new[file])
    kept = [each for each in _resources(file, old.get(file, "resources: []")) if each["name"] not in renewed]
    # A front door with another name has a port, which the new one may need.
    kept = [each for each in kept if "address" not in each]
    return new[file] + (_KEPT + yaml.safe_dump(kept, sort_keys=False, width=1000) if kept else "")


def _resources(file: str, text: str) -> list[dict[str, Any]]:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML; move it away") from error
    resources = document.get("resources") if isinstance(document, dict) else None
    if not isinstance(resources, list) or not all(isinstance(each, dict) and "name" in each for each in resources):
        raise ValueError(f"{file} has no list of named resources; move it away")
    return resources


def _build_bootstrap(config: Config) -> bootstrap.Bootstrap:
    admin = to_listen_on(config.envoy.admin, ipv4_compat=config.envoy.ipv4_compat)
    return commented(
        bootstrap.Bootstrap(
            node=commented(
                core.Node(id="dp-extproc", cluster="dp-extproc"),
                "Envoy demands both for dynamic resources. Any text will do.",
            ),
            dynamic_resources=bootstrap.BootstrapDynamicResources(
                lds_config=_file(LISTENERS), cds_config=_file(CLUSTERS)
            ),
            admin=bootstrap.Admin(address=admin),
            bootstrap_extensions=[
                commented(build_bootstrap_extension(), "Exactly once. Without it, Envoy refuses lds.yaml.")
            ],
        ),
        _BOOTSTRAP,
    )


def _take_routes_from_file(listener: Listener) -> None:
    """Let *listener* read its routes from a file. Their change then leaves the listener and its connections alone."""
    network_filter = listener.filter_chains[0].filters[-1]
    manager = None if network_filter.typed_config is None else unpack(network_filter.typed_config)
    if not isinstance(manager, hcm.HttpConnectionManager):
        raise TypeError(f"the listener {listener.name} has no connection manager")
    manager.route_config = None
    manager.rds = hcm.Rds(config_source=_file(ROUTES), route_config_name=listener.name)
    network_filter.typed_config = pack(manager)


def _file(name: str) -> core.ConfigSource:
    """Return the source of a file beside the bootstrap. Envoy finds no file without a directory in its name."""
    return core.ConfigSource(path_config_source=core.PathConfigSource(path=f"./{name}"))


def _render(resources: Sequence[Message]) -> str:
    return render_yaml({"resources": [pack(each) for each in resources]})
