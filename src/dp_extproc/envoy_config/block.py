"""The block: what dp-extproc needs in any Envoy, behind whichever listener takes the requests of clients."""

from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.config.listener.v3 import Listener
from envoy_data_plane.envoy.extensions.bootstrap.internal_listener.v3 import InternalListener
from msgspec import Struct

from dp_extproc.config import Config
from dp_extproc.envoy_config.clusters import build_clusters
from dp_extproc.envoy_config.listeners import build_internal_listeners
from dp_extproc.envoy_config.yaml_text import pack


class Block(Struct, frozen=True):
    """Listeners and clusters. A route to the cluster :attr:`.Names.dispatch` leads into the block."""

    listeners: list[Listener]
    """The internal listeners, in the order in which requests pass them."""
    clusters: list[Cluster]


def build_block(config: Config) -> Block:
    """Build the block of a configuration."""
    return Block(build_internal_listeners(config), build_clusters(config))


def build_bootstrap_extension() -> TypedExtensionConfig:
    """Build the extension without which Envoy refuses internal listeners. A bootstrap must have it exactly once."""
    return TypedExtensionConfig(name="envoy.bootstrap.internal_listener", typed_config=pack(InternalListener()))
