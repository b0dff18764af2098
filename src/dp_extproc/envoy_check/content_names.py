"""Undoes the names of the form ``xds``, in which all names of the block begin with a hash of its content."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from dp_extproc.envoy_check.messages import mentions
from dp_extproc.envoy_check.snapshot import Rejection, Resource, Snapshot

_HASHED: Final = re.compile(r"(?P<head>.*?)(?P<hash>[0-9a-f]{8}-)(?P<rest>.+)")


def without_hashes(snapshot: Snapshot, names: Collection[str], entrance: str) -> Snapshot:
    """Return the Envoy with plain names of the block.

    A block to which no route leads is left out: it has been kept for requests that began before a change.

    Args:
        snapshot: What the Envoy has.
        names: Plain names of the listeners and clusters of the block.
        entrance: That of the cluster to which routes lead.
    """
    resources: Sequence[Resource | Rejection] = (*snapshot.listeners, *snapshot.clusters, *snapshot.rejected)
    plain = {each.name: stem for each in resources if (stem := _stem(each.name)) in names}
    if not plain:
        return snapshot
    routers = [each.data for each in (*snapshot.listeners, *snapshot.routes) if each.name not in plain]
    ways = [
        name for name, stem in plain.items() if stem == entrance and any(mentions(each, (name,)) for each in routers)
    ]
    used = tuple(name.removesuffix(_rest(name)) for name in ways)
    left_out = {name for name in plain if not name.startswith(used)}

    def rename(each: Resource) -> Resource:
        return replace(each, name=plain.get(each.name, each.name), data=_plain(each.data, used))

    def kept(of_kind: Sequence[Resource]) -> list[Resource]:
        return [rename(each) for each in of_kind if each.name not in left_out]

    return replace(
        snapshot,
        listeners=kept(snapshot.listeners),
        clusters=kept(snapshot.clusters),
        endpoints=kept(snapshot.endpoints),
        routes=kept(snapshot.routes),
        rejected=[replace(each, name=plain.get(each.name, each.name)) for each in snapshot.rejected],
    )


def _stem(name: str) -> str | None:
    found = _HASHED.fullmatch(name)
    return None if found is None else found["head"] + found["rest"]


def _rest(name: str) -> str:
    found = _HASHED.fullmatch(name)
    return "" if found is None else found["rest"]


def _plain(data: Any, beginnings: tuple[str, ...]) -> Any:
    """Return *data* without the hash in each text that begins with one of *beginnings*."""
    if isinstance(data, Mapping):
        return {key: _plain(value, beginnings) for key, value in data.items()}
    if isinstance(data, list):
        return [_plain(value, beginnings) for value in data]
    return _stem(data) if isinstance(data, str) and beginnings and data.startswith(beginnings) else data
