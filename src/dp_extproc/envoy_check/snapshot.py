"""What an Envoy has: the resources of a ``/config_dump``, of a bootstrap, or of files with parts of one."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct, field

from dp_extproc.envoy_check.messages import UnreadableError

_WORD: Final = re.compile(r"(?<=[a-z0-9])([A-Z])")
_MOST_NESTED: Final = 4
"""Levels of mappings in which a dump may be: ``egctl`` puts it below namespace and pod."""


class State(StrEnum):
    """Whether requests use a resource."""

    ACTIVE = "active"
    WARMING = "warming"
    DRAINING = "draining"


class Resource(Struct, frozen=True):
    """A listener, a cluster or another named part, as plain values."""

    name: str
    data: Mapping[str, Any]
    state: State = State.ACTIVE


class Rejection(Struct, frozen=True):
    """An update that Envoy did not accept."""

    kind: str
    name: str
    details: str


class Snapshot(Struct, frozen=True):
    """What an Envoy has, as far as the documents that were read have it."""

    listeners: Sequence[Resource] = ()
    clusters: Sequence[Resource] = ()
    routes: Sequence[Resource] = ()
    """Route tables that listeners refer to by name."""
    scopes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the route tables of each set of scoped routes."""
    filters: Sequence[Resource] = ()
    """Filters that listeners refer to by name."""
    endpoints: Sequence[Resource] = ()
    """Endpoints of clusters that refer to them by name."""
    rejected: Sequence[Rejection] = ()
    extensions: Sequence[str] | None = None
    """Names of the bootstrap extensions; None if no document has the bootstrap."""
    built_in: Collection[str] = ()
    """Names of the extensions that this build of Envoy has; empty if no document has them."""
    version: tuple[int, int, int] | None = None
    state: str | None = None
    drain_seconds: float | None = None


def snake(data: Any) -> Mapping[str, Any]:
    """Return a mapping whose own keys are in snake case. Envoy reads both, and other programs write camel case.

    Raises:
        UnreadableError: It is no mapping.
    """
    if not isinstance(data, Mapping):
        raise UnreadableError(f"a mapping is expected, and it is {type(data).__name__}")
    return {_WORD.sub(lambda found: f"_{found[1].lower()}", str(key)): value for key, value in data.items()}


def read_snapshot(documents: Iterable[Any]) -> Snapshot:
    """Read everything that some documents have together.

    Raises:
        UnreadableError: One of them has nothing of an Envoy, or is malformed.
    """
    parts: dict[str, Any] = {}
    for document in documents:
        for kind, value in _parts(document):
            present = parts.get(kind)
            if isinstance(present, list):
                present.append(value)
            elif isinstance(present, dict):
                present.update(value)
            else:
                parts[kind] = [value] if kind in _LISTS else value
    return Snapshot(**parts)


_LISTS: Final = frozenset({"listeners", "clusters", "routes", "filters", "endpoints", "rejected"})
_Part = tuple[str, Any]
"""A field of :class:`Snapshot` and a value, or an item of its list."""


def _parts(document: Any) -> Iterator[_Part]:
    data = snake(document)
    if "kind" in data and "api_version" in data:
        raise UnreadableError(
            f"it is a resource of Kubernetes ({data['kind']}), not what Envoy made of it; "
            "save the page /config_dump of the gateway's Envoy"
        )
    if "configs" in data:
        yield from _of_dump(data)
    elif "static_resources" in data or "dynamic_resources" in data:
        yield from _of_bootstrap(data)
    elif "resources" in data:
        for each in _list(data, "resources"):
            yield from _of_resource(snake(each))
    elif data.keys() & _OF_PARTS.keys():
        yield from _of_parts(data)
    elif len(found := list(_nested_dumps(data, _MOST_NESTED))) == 1:
        yield from _of_dump(found[0])
    elif found:
        raise UnreadableError(f"it has {len(found)} dumps; save the one of the gateway")
    else:
        raise UnreadableError(
            "it has none of the keys configs (a page /config_dump), static_resources (a bootstrap), resources (a file "
            "for xDS), listeners and clusters"
        )


def _nested_dumps(data: Any, levels: int) -> Iterator[Mapping[str, Any]]:
    if not isinstance(data, Mapping) or not levels:
        return
    for value in data.values():
        if isinstance(value, Mapping) and isinstance(value.get("configs"), list):
            yield value
        else:
            yield from _nested_dumps(value, levels - 1)


def _of_dump(dump: Mapping[str, Any]) -> Iterator[_Part]:
    for section in _list(dump, "configs"):
        data = snake(section)
        kind = str(data.get("@type", "")).rpartition(".")[2]
        if read := _SECTIONS.get(kind):
            yield from read(data)


def _of_bootstrap_section(data: Mapping[str, Any]) -> Iterator[_Part]:
    bootstrap = snake(data.get("bootstrap", {}))
    yield "extensions", _extension_names(bootstrap)
    node = snake(bootstrap.get("node", {}))
    yield "built_in", frozenset(str(snake(each).get("name")) for each in _list(node, "extensions"))
    build = snake(node.get("user_agent_build_version", {}))
    version = snake(build.get("version", {}))
    numbers = [version.get(key, 0) for key in ("major_number", "minor_number", "patch")]
    if version and all(isinstance(each, int) for each in numbers):
        yield "version", tuple(numbers)


def _of_listeners(data: Mapping[str, Any]) -> Iterator[_Part]:
    for each in _list(data, "static_listeners"):
        yield "listeners", _resource(snake(each).get("listener"), State.ACTIVE)
    for each in _list(data, "dynamic_listeners"):
        entry = snake(each)
        for state in State:
            if (found := entry.get(f"{state.value}_state")) is not None and "listener" in snake(found):
                yield "listeners", _resource(snake(found)["listener"], state)
        yield from _rejection("listener", entry.get("name"), entry)


def _of_clusters(data: Mapping[str, Any]) -> Iterator[_Part]:
    for key, state in (
        ("static_clusters", State.ACTIVE),
        ("dynamic_active_clusters", State.ACTIVE),
        ("dynamic_warming_clusters", State.WARMING),
    ):
        for each in _list(data, key):
            yield from _entry("clusters", "cluster", snake(each), state)


def _of_routes(data: Mapping[str, Any]) -> Iterator[_Part]:
    for each in _list(data, "dynamic_route_configs"):
        yield from _entry("routes", "route_config", snake(each))


def _of_scoped_routes(data: Mapping[str, Any]) -> Iterator[_Part]:
    found: dict[str, list[str]] = {}
    for each in _list(data, "dynamic_scoped_route_configs"):
        entry = snake(each)
        scopes = [snake(scope) for scope in _list(entry, "scoped_route_configs")]
        found[str(entry.get("name"))] = [str(scope.get("route_configuration_name")) for scope in scopes]
        yield from _rejection("scoped routes", entry.get("name"), entry)
    yield "scopes", found


def _of_filters(data: Mapping[str, Any]) -> Iterator[_Part]:
    for each in _list(data, "ecds_filters"):
        yield from _entry("filters", "ecds_filter", snake(each))


def _of_endpoints(data: Mapping[str, Any]) -> Iterator[_Part]:
    for each in _list(data, "dynamic_endpoint_configs"):
        yield from _entry("endpoints", "endpoint_config", snake(each), name="cluster_name")


_SECTIONS: Final = {
    "BootstrapConfigDump": _of_bootstrap_section,
    "ListenersConfigDump": _of_listeners,
    "ClustersConfigDump": _of_clusters,
    "RoutesConfigDump": _of_routes,
    "ScopedRoutesConfigDump": _of_scoped_routes,
    "EcdsConfigDump": _of_filters,
    "EndpointsConfigDump": _of_endpoints,
}


def _of_bootstrap(data: Mapping[str, Any]) -> Iterator[_Part]:
    yield "extensions", _extension_names(data)
    static = snake(data.get("static_resources") or {})
    yield from _of_parts({key: static[key] for key in ("listeners", "clusters") if key in static})


_OF_PARTS: Final = {"listeners": "listeners", "clusters": "clusters", "route_configs": "routes", "routes": "routes"}
"""Keys of a file with parts of a bootstrap, and the fields of :class:`Snapshot` to which they belong."""


def _of_parts(data: Mapping[str, Any]) -> Iterator[_Part]:
    for key, kind in _OF_PARTS.items():
        for each in _list(data, key):
            yield kind, _resource(each)
    if "bootstrap_extensions" in data:
        yield "extensions", _extension_names(data)


_KINDS: Final = {
    "Listener": "listeners",
    "Cluster": "clusters",
    "RouteConfiguration": "routes",
    "TypedExtensionConfig": "filters",
    "ClusterLoadAssignment": "endpoints",
}


def _of_resource(data: Mapping[str, Any]) -> Iterator[_Part]:
    """Read one resource as xDS delivers it: the message itself, or wrapped in a ``Resource`` with a version."""
    kind = str(data.get("@type", "")).rpartition(".")[2]
    if kind == "Resource":
        yield from _of_resource(snake(data.get("resource")))
    elif kind in _KINDS:
        yield _KINDS[kind], _resource(data, name="cluster_name" if kind == "ClusterLoadAssignment" else "name")


def _entry(
    kind: str, key: str, entry: Mapping[str, Any], state: State = State.ACTIVE, *, name: str = "name"
) -> Iterator[_Part]:
    """Read an entry of a dump: the resource that is used, and the update that was rejected after it."""
    resource = None
    if entry.get(key) is not None:
        resource = _resource(entry[key], state, name=name)
        yield kind, resource
    yield from _rejection(key.replace("_", " "), resource.name if resource else None, entry)


def _rejection(kind: str, name: Any, entry: Mapping[str, Any]) -> Iterator[_Part]:
    if (error := entry.get("error_state")) is not None:
        failed = snake(snake(error).get("failed_configuration") or {})
        given = name or failed.get("name") or "unnamed"
        yield "rejected", Rejection(kind, str(given), str(snake(error).get("details", "no details")))


def _resource(data: Any, state: State = State.ACTIVE, *, name: str = "name") -> Resource:
    fields = snake(data)
    return Resource(str(fields.get(name, "")), fields, state)


def _extension_names(bootstrap: Mapping[str, Any]) -> list[str]:
    return [_extension_type(snake(each)) for each in _list(bootstrap, "bootstrap_extensions")]


def _extension_type(extension: Mapping[str, Any]) -> str:
    """Return the type of an extension; Envoy goes by it, and the name may be any."""
    typed = extension.get("typed_config")
    url = typed.get("@type", "") if isinstance(typed, Mapping) else ""
    return str(url).rpartition(".")[2] or str(extension.get("name", ""))


def _list(data: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = data.get(key) or []
    if not isinstance(found, list):
        raise UnreadableError(f"{key} is expected to be a list, and it is {type(found).__name__}")
    return found
