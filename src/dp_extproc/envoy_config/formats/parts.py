"""The parts that a team puts into an Envoy bootstrap of its own, one file for each place."""

from typing import Final

from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap

from dp_extproc.config import Config
from dp_extproc.envoy_config.block import build_block, build_bootstrap_extension
from dp_extproc.envoy_config.entrance import entrance_route, strip_filter
from dp_extproc.envoy_config.formats.target import Target
from dp_extproc.envoy_config.front_door import build_front_door
from dp_extproc.envoy_config.yaml_text import Document, commented, render_yaml

BLOCK: Final = "block.yaml"
ROUTE: Final = "route.yaml"
FILTER: Final = "filter.yaml"
FRONT_DOOR: Final = "front-door.yaml"

_OF_THE_LISTENER: Final = "it is in front-door.yaml only; set it in your own listener"
WITHOUT_EFFECT: Final = {
    "tls": _OF_THE_LISTENER,
    "accept_http_10": _OF_THE_LISTENER,
    "cors": "it is in front-door.yaml only; set CORS in your own virtual host",
    "request_headers_timeout": _OF_THE_LISTENER,
    "request_timeout": _OF_THE_LISTENER,
    "ipv4_compat": _OF_THE_LISTENER,
}
"""Keys of the front door, of which the form has an example only."""

_BLOCK: Final = """\
The block: add the items of each list below to the same list of your bootstrap. Nothing else of yours changes.

If your bootstrap_extensions have envoy.bootstrap.internal_listener already, leave it out here. With two of them Envoy
starts, and answers 503 to every request of the block.
"""
_ROUTE: Final = """\
The way into the block: put it before the other routes of your virtual host. Replace "match" by your condition.
"""
_FILTER: Final = """\
Add it to http_filters of the connection manager that has the route, directly before envoy.filters.http.router.
"""
_FRONT_DOOR: Final = """\
An example: a listener that has nothing but the way into the block. You do not need it if you have one of your own.
"""


def files(config: Config, _: Target) -> dict[str, str]:
    """Return the block, the route and the filter that lead to it, and a listener as an example."""
    block = build_block(config)
    in_bootstrap = bootstrap.Bootstrap(
        static_resources=bootstrap.BootstrapStaticResources(listeners=block.listeners, clusters=block.clusters),
        bootstrap_extensions=[build_bootstrap_extension()],
    )
    in_example = bootstrap.BootstrapStaticResources(listeners=[build_front_door(config)])
    return {
        BLOCK: render_yaml(commented(in_bootstrap, _BLOCK)),
        ROUTE: _render(_ROUTE, [entrance_route(config)]),
        FILTER: _render(_FILTER, [strip_filter(config)]),
        FRONT_DOOR: render_yaml(commented(bootstrap.Bootstrap(static_resources=in_example), _FRONT_DOOR)),
    }


def _render(where: str, document: Document) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in where.splitlines()) + render_yaml(document)
