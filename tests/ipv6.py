"""Tests over IPv6 loopback, where a machine has it."""

import socket

import pytest


def _is_there() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


needs_ipv6 = pytest.mark.skipif(not _is_there(), reason="no IPv6 loopback on this machine")
