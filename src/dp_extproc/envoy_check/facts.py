"""What the rules of an audit read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Self

from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from msgspec import Struct

from dp_extproc.config import Config
from dp_extproc.envoy_check.content_names import without_hashes
from dp_extproc.envoy_check.findings import Finding, finding
from dp_extproc.envoy_check.messages import UnreadableError, mentions, read_message
from dp_extproc.envoy_check.snapshot import Resource, Snapshot, State, snake
from dp_extproc.envoy_config.block import Block, build_block
from dp_extproc.envoy_config.names import Names


class Facts(Struct, frozen=True):
    """The configuration, the block that it needs, and the Envoy that is checked."""

    config: Config
    names: Names
    block: Block
    names_of_block: frozenset[str]
    """Names of all listeners and clusters of the block."""
    snapshot: Snapshot
    clusters: Mapping[str, Resource]
    """Active clusters by name."""
    listeners: Mapping[str, Resource]
    """Active listeners by name."""
    endpoints: Mapping[str, Resource]
    """Endpoints by the name that clusters use."""
    entrances: Collection[str]
    """Names of the clusters that lead into the block. A controller may have chosen one."""
    not_read: list[Finding]
    """Findings about parts that could not be read. Rules append to it."""
    read: dict[str, Cluster | None]
    """Clusters that were read already, by name."""

    @classmethod
    def of(cls, snapshot: Snapshot, config: Config) -> Self:
        """Collect the facts about an Envoy and a configuration."""
        names, block = Names.of(config), build_block(config)
        names_of_block = frozenset(each.name for part in (block.listeners, block.clusters) for each in part)
        snapshot = without_hashes(snapshot, names_of_block, names.dispatch)
        clusters = _active(snapshot.clusters)
        endpoints = {each.name: each for each in snapshot.endpoints}
        return cls(
            config=config,
            names=names,
            block=block,
            names_of_block=names_of_block,
            snapshot=snapshot,
            clusters=clusters,
            listeners=_active(snapshot.listeners),
            endpoints=endpoints,
            entrances=[
                name
                for name, resource in clusters.items()
                if any(mentions(each, (names.dispatch,)) for each in destinations(resource, endpoints))
            ],
            not_read=[],
            read={},
        )

    def cluster(self, name: str) -> Cluster | None:
        """Read an active cluster; None if there is none, or it cannot be read."""
        if name in self.clusters and name not in self.read:
            try:
                self.read[name] = read_message(Cluster, self.clusters[name].data)
            except UnreadableError as error:
                self.skip(f"cluster {name}", str(error))
                self.read[name] = None
        return self.read.get(name)

    def skip(self, place: str, reason: str) -> None:
        """Note that a part was not checked."""
        note = finding("not_read", place, reason=reason)
        if note not in self.not_read:
            self.not_read.append(note)


def destinations(cluster: Resource, endpoints: Mapping[str, Resource]) -> Iterator[Mapping[str, Any]]:
    """Yield what has the addresses of a cluster: the cluster itself, and the endpoint set that it refers to."""
    yield cluster.data
    service = cluster.data.get("eds_cluster_config")
    given = snake(service).get("service_name") if isinstance(service, Mapping) else None
    name = given if isinstance(given, str) and given else cluster.name
    if (found := endpoints.get(name)) is not None:
        yield found.data


def _active(resources: Sequence[Resource]) -> dict[str, Resource]:
    """Return the resources that requests use by name; one that warms up counts if there is no other."""
    found = {each.name: each for each in resources if each.state is State.WARMING}
    return found | {each.name: each for each in resources if each.state is State.ACTIVE}
