"""The port of an engine among those that a slice or a pod declares. Pure."""

from collections.abc import Iterable
from typing import Final

from dp_extproc.fleet.discovery.kubernetes.labels import BOOTSTRAP

_HTTP: Final = "http"
"""Name of the port that is taken if none is configured."""


def declared_ports(ports: Iterable[tuple[str | None, int | None, str | None]]) -> dict[str, int]:
    """Map names of TCP ports to their numbers. A port without a name, or with a repeated one, goes by its number."""
    found: dict[str, int] = {}
    for name, number, protocol in ports:
        if number is not None and protocol in {None, "", "TCP"}:
            found[name if name and name not in found else f"{number}"] = number
    return found


def pick_port(ports: dict[str, int], wanted: int | str | None) -> int:
    """Pick the port of an engine.

    A configured number counts whatever is declared. Without a configured port that is the port named ``http``, or else
    the only one beside the bootstrap port; the order of ports never counts.

    Raises:
        ValueError: There is no such port; the message ends with what to write.
    """
    if isinstance(wanted, int):
        return wanted
    named = _HTTP if wanted is None else wanted
    if named in ports:
        return ports[named]
    others = [number for name, number in ports.items() if name != BOOTSTRAP]
    if wanted is None and len(others) == 1:
        return others[0]
    names = ", ".join(sorted(ports)) or "none"
    raise ValueError(f"no port is named {named} (there are: {names}); write port: NAME or port: NUMBER")
