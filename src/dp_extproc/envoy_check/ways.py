"""The ways of requests in an Envoy: which listener, virtual host and route leads to which cluster."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from betterproto2 import Message
from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, Listener
from envoy_data_plane.envoy.config.route.v3 import FilterConfig, Route, RouteConfiguration, VirtualHost
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpFilter,
)
from envoy_data_plane.envoy.extensions.filters.network.tcp_proxy.v3 import TcpProxy
from envoy_data_plane.google.protobuf import Any as PackedMessage
from envoy_data_plane.message_pool import default_message_pool
from msgspec import Struct

from dp_extproc.envoy_check.messages import UnreadableError, mentions, read_message, type_name, unpack
from dp_extproc.envoy_check.snapshot import Resource, Snapshot, State

NotRead = Callable[[str, str], object]
"""Called with the place and the reason of a part that cannot be read."""

_UNNAMED: Final = "without a name"


class HttpStep(Struct, frozen=True):
    """One HTTP filter on a way, with the settings of the route."""

    name: str
    kind: str
    """Name of its type, such as ``ExternalProcessor``."""
    settings: Message | None
    """Settings of the filter; None if they have no class here."""
    on_route: Message | None
    """Settings that the route, its virtual host or its table has for this filter."""


class Way(Struct, frozen=True):
    """One route of one listener."""

    listener: Listener
    manager: HttpConnectionManager
    table: RouteConfiguration
    host: VirtualHost
    route: Route
    place: str
    filters: Mapping[str, PackedMessage | None]
    """Settings of the filters that the connection manager refers to by name."""

    @property
    def clusters(self) -> AbstractSet[str]:
        """The clusters to which the route leads."""
        action = self.route.route
        if action is None:
            return frozenset()
        weighted = action.weighted_clusters.clusters if action.weighted_clusters else []
        return {each for each in (action.cluster, *(part.name for part in weighted)) if each}

    @property
    def steps(self) -> list[HttpStep]:
        """The HTTP filters that run for this route, in their order."""
        return [step for each in self.manager.http_filters if (step := self._step(each)) is not None]

    def _step(self, filter_: HttpFilter) -> HttpStep | None:
        packed = filter_.typed_config if filter_.typed_config is not None else self.filters.get(filter_.name)
        override = None
        is_disabled = filter_.disabled
        for part in (self.route, self.host, self.table):
            if (found := part.typed_per_filter_config.get(filter_.name)) is not None:
                override, is_disabled = _override(found)
                break
        if is_disabled:
            return None
        return HttpStep(filter_.name, type_name(packed), unpack(packed), override)


def _override(packed: PackedMessage) -> tuple[Message | None, bool]:
    """Return the settings of a filter on a route, and whether it is disabled there."""
    settings = unpack(packed)
    if isinstance(settings, FilterConfig):
        return unpack(settings.config), settings.disabled
    return settings, getattr(settings, "disabled", None) is True


def ways_to(
    snapshot: Snapshot, clusters: Collection[str], not_read: NotRead, *, inside: Collection[str] = ()
) -> Iterator[Way]:
    """Yield every route to one of *clusters*.

    Only listeners and route tables that mention one are read, since gateways have thousands of others.

    Args:
        snapshot: The Envoy.
        clusters: Names of clusters.
        not_read: Called for each part that cannot be read.
        inside: Names of listeners that are left out.
    """
    tables = {each.name: each for each in snapshot.routes if mentions(each.data, clusters)}
    scopes = {name for name, found in snapshot.scopes.items() if not tables.keys().isdisjoint(found)}
    wanted = {*clusters, *tables, *scopes}
    listeners = [each for each in snapshot.listeners if each.name not in inside and mentions(each.data, wanted)]
    return (way for way in _ways(snapshot, listeners, tables, not_read) if not way.clusters.isdisjoint(clusters))


def ways_with(snapshot: Snapshot, kind: type[Message], not_read: NotRead) -> Iterator[Way]:
    """Yield every route of the listeners that have an HTTP filter of a kind."""
    wanted = {default_message_pool.type_to_url[kind]}
    wanted |= {each.name for each in snapshot.filters if mentions(each.data, wanted)}
    listeners = [each for each in snapshot.listeners if mentions(each.data, wanted)]
    return _ways(snapshot, listeners, {each.name: each for each in snapshot.routes}, not_read)


def _ways(
    snapshot: Snapshot, listeners: Iterable[Resource], tables: Mapping[str, Resource], not_read: NotRead
) -> Iterator[Way]:
    filters = _filters(snapshot)
    for resource in listeners:
        if resource.state is State.DRAINING:
            continue
        place = f"listener {resource.name or _UNNAMED}"
        try:
            listener = read_message(Listener, resource.data)
            for chain, manager in managers(listener):
                where = f"{place}{chain}"
                for table in _tables(snapshot, tables, manager, where, not_read):
                    for host in table.virtual_hosts:
                        for number, route in enumerate(host.routes):
                            at = f"{where}, virtual host {host.name}, route {route.name or f'number {number}'}"
                            yield Way(listener, manager, table, host, route, at, filters)
        except UnreadableError as error:
            not_read(place, str(error))


def managers(listener: Listener) -> Iterator[tuple[str, HttpConnectionManager]]:
    """Yield the connection managers of a listener with the place of each chain, which is empty for a single one."""
    for place, _, settings in network_filters(listener):
        if isinstance(settings, HttpConnectionManager):
            yield place, settings


def network_filters(listener: Listener) -> Iterator[tuple[str, Filter, Message | None]]:
    """Yield the network filters of a listener with the place of their chain and their settings."""
    chains: list[tuple[str, FilterChain]] = [
        (each.name or f"number {number}", each) for number, each in enumerate(listener.filter_chains)
    ]
    if listener.default_filter_chain is not None:
        chains.append((listener.default_filter_chain.name or "the default one", listener.default_filter_chain))
    for name, chain in chains:
        place = f", filter chain {name}" if len(chains) > 1 else ""
        for each in chain.filters:
            yield place, each, unpack(each.typed_config)


def forwards_to(listener: Listener, clusters: Collection[str]) -> bool:
    """Return whether the listener forwards bytes to one of *clusters*."""
    proxies = [settings for _, _, settings in network_filters(listener) if isinstance(settings, TcpProxy)]
    weighted = [part.name for each in proxies if each.weighted_clusters for part in each.weighted_clusters.clusters]
    return not set(clusters).isdisjoint([*(each.cluster for each in proxies), *weighted])


def _tables(
    snapshot: Snapshot,
    known: Mapping[str, Resource],
    manager: HttpConnectionManager,
    place: str,
    not_read: NotRead,
) -> Iterator[RouteConfiguration]:
    names: list[str] = []
    if manager.route_config is not None:
        yield manager.route_config
    if manager.rds is not None:
        names.append(manager.rds.route_config_name)
    if (scoped := manager.scoped_routes) is not None:
        names += snapshot.scopes.get(scoped.name, ())
        inline = scoped.scoped_route_configurations_list
        for each in inline.scoped_route_configurations if inline else ():
            if each.route_configuration is not None:
                yield each.route_configuration
            names.append(each.route_configuration_name)
    for name in dict.fromkeys(names):
        if name in known:
            try:
                yield read_message(RouteConfiguration, known[name].data)
            except UnreadableError as error:
                not_read(f"{place}, route table {name}", str(error))


def _filters(snapshot: Snapshot) -> Mapping[str, PackedMessage | None]:
    found: dict[str, PackedMessage | None] = {}
    for each in snapshot.filters:
        try:
            found[each.name] = read_message(TypedExtensionConfig, each.data).typed_config
        except UnreadableError:
            found[each.name] = None
    return found
