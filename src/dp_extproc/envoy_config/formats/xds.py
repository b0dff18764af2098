"""Files of listeners, clusters and routes that Envoy reads again whenever one of them is replaced."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml
from betterproto2 import Message
from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.listener.v3 import Listener
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm

from dp_extproc.config import Config
from dp_extproc.envoy_config.block import build_block, build_bootstrap_extension
from dp_extproc.envoy_config.drain_safe import name_by_content
from dp_extproc.envoy_config.formats.target import Target
from dp_extproc.envoy_config.front_door import build_front_door
from dp_extproc.envoy_config.yaml_text import commented, pack, render_yaml, unpack

BOOTSTRAP: Final = "bootstrap.yaml"
ROUTES: Final = "rds.yaml"
LISTENERS: Final = "lds.yaml"
CLUSTERS: Final = "cds.yaml"

_BOOTSTRAP: Final = """\
Start Envoy in the directory of these files: envoy -c bootstrap.yaml

It reads this file once. It reads the others again when they are replaced by rename. See docs/mesh/envoy.md.
"""
_KEPT: Final = """\
# Kept for streams that began before the change. No cluster leads here any more.
"""


def files(config: Config, _: Target) -> dict[str, str]:
    """Return a bootstrap and the files that it names, in the order in which to replace these."""
    block = name_by_content(build_block(config))
    front_door = build_front_door(config)
    routes = _move_routes(front_door)
    return {
        BOOTSTRAP: render_yaml(_build_bootstrap(config)),
        ROUTES: _render([routes]),
        LISTENERS: _render([front_door, *block.listeners]),
        CLUSTERS: _render(block.clusters),
    }


def keep(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Return the new files with the internal listeners of the old ones, whose streams may last.

    Raises:
        ValueError: The old files are not of this form.
    """
    names = {each["name"] for each in _resources(new[LISTENERS])}
    kept = [
        each
        for each in _resources(old.get(LISTENERS, "resources: []"))
        if "internal_listener" in each and each["name"] not in names
    ]
    if not kept:
        return dict(new)
    return {**new, LISTENERS: new[LISTENERS] + _KEPT + yaml.safe_dump(kept, sort_keys=False, width=1000)}


def _resources(text: str) -> list[dict[str, Any]]:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{LISTENERS} is not YAML") from error
    resources = document.get("resources") if isinstance(document, dict) else None
    if not isinstance(resources, list) or not all(isinstance(each, dict) and "name" in each for each in resources):
        raise ValueError(f"{LISTENERS} has no list of named resources")
    return resources


def _build_bootstrap(config: Config) -> bootstrap.Bootstrap:
    admin = core.SocketAddress(address=config.envoy.admin.host, port_value=config.envoy.admin.port)
    return commented(
        bootstrap.Bootstrap(
            node=commented(
                core.Node(id="dp-extproc", cluster="dp-extproc"),
                "Envoy demands both for dynamic resources. Any text will do.",
            ),
            dynamic_resources=bootstrap.BootstrapDynamicResources(
                lds_config=_file(LISTENERS), cds_config=_file(CLUSTERS)
            ),
            admin=bootstrap.Admin(address=core.Address(socket_address=admin)),
            bootstrap_extensions=[
                commented(build_bootstrap_extension(), "Exactly once. Without it, Envoy refuses lds.yaml.")
            ],
        ),
        _BOOTSTRAP,
    )


def _move_routes(listener: Listener) -> RouteConfiguration:
    """Let *listener* read its routes from a file, and return them.

    A change of routes then leaves the listener and its connections alone.
    """
    network_filter = listener.filter_chains[0].filters[-1]
    if network_filter.typed_config is None or not isinstance(
        manager := unpack(network_filter.typed_config), hcm.HttpConnectionManager
    ):
        raise TypeError(f"the listener {listener.name} has no connection manager")
    routes, manager.route_config = manager.route_config, None
    if routes is None:
        raise TypeError(f"the listener {listener.name} has no routes")
    routes.name = listener.name
    manager.rds = hcm.Rds(config_source=_file(ROUTES), route_config_name=listener.name)
    network_filter.typed_config = pack(manager)
    return routes


def _file(name: str) -> core.ConfigSource:
    """Return the source of a file beside the bootstrap. Envoy finds no file without a directory in its name."""
    return core.ConfigSource(path_config_source=core.PathConfigSource(path=f"./{name}"))


def _render(resources: Sequence[Message]) -> str:
    return render_yaml({"resources": [pack(each) for each in resources]})
