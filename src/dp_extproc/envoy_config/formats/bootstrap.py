"""A whole Envoy bootstrap: every listener and cluster in one file."""

from typing import Final

from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.bootstrap.internal_listener.v3 import InternalListener

from dp_extproc.config import Config
from dp_extproc.envoy_config.clusters import build_clusters
from dp_extproc.envoy_config.listeners import build_front_door, build_internal_listeners
from dp_extproc.envoy_config.yaml_text import commented, pack

_HEADER: Final = """\
Printed by: dp-extproc envoy-config -c FILE

Envoy in front of SGLang engines with prefill/decode disaggregation and several data-parallel ranks.

  client -> inference -> dp_dispatch -> decode engine
                             `--mirror-> prefill_leg -> prefill engine

The service dp-extproc picks both endpoints and their ranks and rewrites the body. It names them in x-dp-* headers, so
this file lists no engine, and endpoints may change without a new one. For the details see docs/envoy.md.
"""


def build_bootstrap(config: Config) -> bootstrap.Bootstrap:
    """Build the file that Envoy starts with. It names no engine, so endpoints may change without a new one."""
    admin = core.SocketAddress(address=config.envoy.admin.host, port_value=config.envoy.admin.port)
    internal = core.TypedExtensionConfig(
        name="envoy.bootstrap.internal_listener", typed_config=pack(InternalListener())
    )
    return commented(
        bootstrap.Bootstrap(
            static_resources=bootstrap.BootstrapStaticResources(
                listeners=[build_front_door(config), *build_internal_listeners(config)], clusters=build_clusters(config)
            ),
            admin=bootstrap.Admin(address=core.Address(socket_address=admin)),
            bootstrap_extensions=[internal],
        ),
        _HEADER,
    )
