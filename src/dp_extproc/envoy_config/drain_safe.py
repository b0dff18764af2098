"""Names of internal listeners that change with their content, so that a change of one never meets its old connections.

Envoy lets the connections of a changed listener go on until its drain time is over, and then closes them with all their
streams. Until then, the connections that a cluster keeps open to the old listener also take new requests. With a new
name, the old listener can stay beside the new one for as long as its streams last. The cluster that leads to it changes
with the name, and a changed cluster opens new connections while the streams on its old ones end undisturbed.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Final

from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.core.v3 import EnvoyInternalAddress

from dp_extproc.envoy_config.block import Block

_DIGITS: Final = 8
"""Hexadecimal digits of the hash. Two contents of one listener get the same name once in 4 billion changes."""


def name_by_content(block: Block) -> Block:
    """Add a hash of its content to the name of each internal listener, and lead the clusters to these names."""
    names: dict[str | None, str] = {}
    for each in block.listeners:
        digest = hashlib.sha256(bytes(each)).hexdigest()[:_DIGITS]
        names[each.name] = each.name = f"{each.name}-{digest}"
    for address in _internal_addresses(block.clusters):
        address.server_listener_name = names[address.server_listener_name]
    return block


def _internal_addresses(clusters: Iterable[Cluster]) -> Iterator[EnvoyInternalAddress]:
    for each in clusters:
        for locality in each.load_assignment.endpoints if each.load_assignment else ():
            for member in locality.lb_endpoints:
                address = member.endpoint.address if member.endpoint else None
                if address is not None and address.envoy_internal_address is not None:
                    yield address.envoy_internal_address
