"""What the rules of an audit read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from msgspec import Struct

from dp_extproc.config import Config
from dp_extproc.envoy_check.findings import Finding, finding
from dp_extproc.envoy_check.messages import UnreadableError, read_message
from dp_extproc.envoy_check.snapshot import Resource, Snapshot, State, snake
from dp_extproc.envoy_config.block import Block
from dp_extproc.envoy_config.names import Names


class Facts(Struct, frozen=True):
    """The configuration, the block that it needs, and the Envoy that is checked."""

    config: Config
    names: Names
    block: Block
    snapshot: Snapshot
    clusters: Mapping[str, Resource]
    """Active clusters by name."""
    listeners: Mapping[str, Resource]
    """Active listeners by name."""
    names_of_block: frozenset[str]
    """Names of all listeners and clusters of the block."""
    not_read: list[Finding]
    """Findings about parts that could not be read. Rules append to it."""

    def cluster(self, name: str) -> Cluster | None:
        """Read an active cluster; None if there is none, or it cannot be read."""
        if (resource := self.clusters.get(name)) is None:
            return None
        try:
            return read_message(Cluster, resource.data)
        except UnreadableError as error:
            self.skip(f"cluster {name}", str(error))
            return None

    def destinations(self, resource: Resource) -> Iterator[Mapping[str, Any]]:
        """Yield what has the addresses of a cluster: the cluster itself, and the endpoint sets that it refers to."""
        yield resource.data
        service = resource.data.get("eds_cluster_config")
        given = snake(service).get("service_name") if isinstance(service, Mapping) else None
        sets = (resource.name, given)
        yield from (each.data for each in self.snapshot.endpoints if each.name in sets)

    def skip(self, place: str, reason: str) -> None:
        """Note that a part was not checked."""
        note = finding("not_read", place, reason=reason)
        if note not in self.not_read:
            self.not_read.append(note)


def active(resources: Sequence[Resource]) -> dict[str, Resource]:
    """Return the resources that requests use by name; one that warms up counts if there is no other."""
    found = {each.name: each for each in resources if each.state is State.WARMING}
    return found | {each.name: each for each in resources if each.state is State.ACTIVE}
