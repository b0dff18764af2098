"""Undoes the names of the form ``xds``, in which each internal listener has a hash of its content in its name."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from dp_extproc.envoy_check.messages import mentions
from dp_extproc.envoy_check.snapshot import Resource, Snapshot

_HASHED: Final = re.compile(r"(.+)-[0-9a-f]{8}")


def without_hashes(snapshot: Snapshot, listeners: Collection[str]) -> Snapshot:
    """Return the Envoy with plain names of the listeners of the block.

    A listener to which no cluster leads is left out: it has been kept for streams that began before a change.
    """
    names = [*(each.name for each in snapshot.listeners), *(each.name for each in snapshot.rejected)]
    matches = {name: _HASHED.fullmatch(name) for name in names}
    plain = {name: found[1] for name, found in matches.items() if found is not None and found[1] in listeners}
    if not plain:
        return snapshot
    used = {
        name: stem for name, stem in plain.items() if any(mentions(each.data, (name,)) for each in snapshot.clusters)
    }
    return replace(
        snapshot,
        listeners=[_renamed(each, used) for each in snapshot.listeners if each.name not in plain or each.name in used],
        clusters=_leading_to(snapshot.clusters, used),
        endpoints=_leading_to(snapshot.endpoints, used),
        rejected=[replace(each, name=plain.get(each.name, each.name)) for each in snapshot.rejected],
    )


def _renamed(listener: Resource, names: Mapping[str, str]) -> Resource:
    name = names.get(listener.name, listener.name)
    return replace(listener, name=name, data={**listener.data, "name": name})


def _leading_to(resources: Sequence[Resource], names: Mapping[str, str]) -> list[Resource]:
    return [
        replace(each, data=_with_names(each.data, names)) if mentions(each.data, names) else each for each in resources
    ]


def _with_names(data: Any, names: Mapping[str, str]) -> Any:
    if isinstance(data, Mapping):
        return {key: _with_names(value, names) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_names(each, names) for each in data]
    return names.get(data, data) if isinstance(data, str) else data
