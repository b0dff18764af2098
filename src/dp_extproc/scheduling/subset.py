"""The endpoints among which a gateway allows to choose (Gateway API Inference Extension, proposal 004)."""

from collections.abc import Iterable


def read_subset(values: Iterable[str]) -> frozenset[str]:
    """Read a subset hint: addresses ``IP:port``, or ``IP`` for all ports of it; in items, or between commas.

    Args:
        values: As they came. An empty hint allows nobody.
    """
    return frozenset(each for value in values for part in value.split(",") if (each := part.strip()))


def allows(subset: frozenset[str], address: str) -> bool:
    """Tell whether ``IP:port`` (IPv6 in brackets) is one of a subset."""
    ip = address.rpartition(":")[0]
    return address in subset or ip in subset or ip.strip("[]") in subset
