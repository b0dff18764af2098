"""The whole Envoy bootstrap as one typed object."""

from envoy_data_plane.envoy.config.bootstrap.v3 import Admin, Bootstrap, BootstrapStaticResources
from envoy_data_plane.envoy.config.core.v3 import Address, SocketAddress, TypedExtensionConfig
from envoy_data_plane.envoy.extensions.bootstrap.internal_listener.v3 import InternalListener
from envoy_data_plane.google.protobuf import Any

from dp_extproc.config import Config
from dp_extproc.envoy_config.clusters import build_clusters
from dp_extproc.envoy_config.listeners import build_listeners


def build_bootstrap(config: Config) -> Bootstrap:
    """Build what Envoy is started with. It names no engine: hosts come and go without a change here."""
    admin = config.envoy.admin
    return Bootstrap(
        static_resources=BootstrapStaticResources(listeners=build_listeners(config), clusters=build_clusters(config)),
        admin=Admin(address=Address(socket_address=SocketAddress(address=admin.host, port_value=admin.port))),
        bootstrap_extensions=[
            TypedExtensionConfig(name="envoy.bootstrap.internal_listener", typed_config=Any.pack(InternalListener()))
        ],
    )
