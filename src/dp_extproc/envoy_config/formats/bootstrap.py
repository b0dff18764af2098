"""A whole Envoy bootstrap: every listener and cluster in one file."""

from typing import Final

from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap
from envoy_data_plane.envoy.config.core import v3 as core

from dp_extproc.config import Config
from dp_extproc.envoy_config.block import build_block, build_bootstrap_extension
from dp_extproc.envoy_config.formats.target import Target
from dp_extproc.envoy_config.front_door import build_front_door, to_listen_on
from dp_extproc.envoy_config.yaml_text import commented, render_yaml

_HEADER: Final = """\
Printed by: dp-extproc envoy-config -c FILE

Envoy in front of SGLang engines with prefill/decode disaggregation and several data-parallel ranks.

{way}

The service dp-extproc picks both endpoints and their ranks and rewrites the body. It names them in x-dp-* headers, so
this file lists no engine, and endpoints may change without a new one. For the details see docs/envoy.md.
"""
_MIRRORED: Final = """\
  client -> inference -> dp_dispatch -> decode engine
                             `--mirror-> prefill_leg -> prefill engine"""
_SENT: Final = """\
  client -> inference -> dp_dispatch -> decode engine
             dp-extproc, asked by dp_dispatch -> prefill engine"""


def build_bootstrap(config: Config) -> bootstrap.Bootstrap:
    """Build the file that Envoy starts with. It names no engine, so endpoints may change without a new one."""
    admin = to_listen_on(config.envoy.admin, ipv4_compat=config.envoy.ipv4_compat)
    block = build_block(config)
    # Envoy requires names of itself before it takes secrets, also from files.
    node = None if config.envoy.secrets is None else core.Node(id="dp-extproc", cluster="dp-extproc")
    return commented(
        bootstrap.Bootstrap(
            node=node,
            static_resources=bootstrap.BootstrapStaticResources(
                listeners=[build_front_door(config), *block.listeners], clusters=block.clusters
            ),
            admin=bootstrap.Admin(address=admin),
            bootstrap_extensions=[build_bootstrap_extension()],
        ),
        _HEADER.format(way=_SENT if config.sends_legs else _MIRRORED),
    )


def files(config: Config, _: Target) -> dict[str, str]:
    """Return the file ``envoy.yaml``."""
    return {"envoy.yaml": render_yaml(build_bootstrap(config))}
