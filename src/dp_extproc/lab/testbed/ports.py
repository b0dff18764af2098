"""Find free TCP ports for programs that do not print which port the kernel gave them."""

import os
import random
import socket
from collections.abc import Iterable
from typing import Final

_BELOW_EPHEMERAL: Final = range(20_000, 32_000)
"""Linux takes the local ports of outgoing connections from 32768 up, so none of these is taken by chance."""
PART: Final = "DP_EXTPROC_PORTS"
"""Variable with a part of the ports, as ``2/3``, so that test processes that run side by side use different ports."""
_given: Final[set[int]] = set()
"""Ports that this process has returned before: their programs may not listen yet, or may listen again."""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of *host* that no process listens on."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return *count* different ports of *host* that no process listens on, and that were not returned before.

    Raises:
        OSError: Too few ports are free.
    """
    found: list[int] = []
    for port in _in_any_order(_ours()):
        if len(found) == count:
            _given.update(found)
            return found
        if _is_free(host, port):
            found.append(port)
    raise OSError(f"fewer than {count} free ports on {host}")


def free_row(count: int, host: str = "127.0.0.1") -> int:
    """Return the first of *count* ports of *host* that follow each other, are free, and were not returned before.

    Raises:
        OSError: There is no such row.
    """
    for first in _in_any_order(_ours()[: 1 - count or None]):
        row = range(first, first + count)
        if _given.isdisjoint(row) and all(_is_free(host, port) for port in row):
            _given.update(row)
            return first
    raise OSError(f"no {count} free ports in a row on {host}")


def _in_any_order(ports: range) -> Iterable[int]:
    """Return all new ports in random order; once half of all have been returned, all count as new."""
    if len(_given) > len(ports) // 2:
        _given.clear()
    return (port for port in random.sample(ports, len(ports)) if port not in _given)


def _ours() -> range:
    number, _, of = os.environ.get(PART, "1/1").partition("/")
    size = len(_BELOW_EPHEMERAL) // int(of)
    return _BELOW_EPHEMERAL[(int(number) - 1) * size : int(number) * size]


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
