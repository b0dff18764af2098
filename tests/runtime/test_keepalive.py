"""Whether the service notices peers that are gone, and bears those that ask whether it is there: frame by frame."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from patience import wait_for

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _PING, _GOAWAY = 4, 6, 7
_ACK: Final = 1
_MORE_THAN_ALLOWED: Final = 8
"""Pings that gRPC's defaults take for an attack, and more than it sends by default where nothing else is sent."""


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceProcess]:
    engine = f"http://127.0.0.1:{free_port()}"  # nobody has started it
    pools: list[dict[str, Any]] = [{"models": ["*"], "workers": {"endpoints": [engine]}}]
    with ServiceProcess(write_config(pools, listen={"keepalive": "200ms"})) as service:
        wait_for(lambda: "ext_proc on" in service.log())
        yield service


class Peer:
    """One end of an HTTP/2 connection without streams."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = connection.makefile("rb")
        connection.sendall(_PREFACE + _frame(_SETTINGS))

    def send_ping(self, *, data: bytes = bytes(8), ack: bool = False) -> None:
        self._connection.sendall(_frame(_PING, data, flags=_ACK if ack else 0))

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Receive frames up to the end of the connection: kind, flags, payload."""
        while head := self._received.read(9):
            kind, flags = head[3], head[4]
            payload = self._received.read(int.from_bytes(head[:3], "big"))
            if kind == _SETTINGS and not flags & _ACK:
                self._connection.sendall(_frame(_SETTINGS, flags=_ACK))
            yield kind, flags, payload


def _frame(kind: int, payload: bytes = b"", *, flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload


@contextmanager
def _connected(service: ServiceProcess) -> Iterator[Peer]:
    address = service.config.listen.grpc
    with socket.create_connection((address.host, address.port), timeout=20) as connection:
        yield Peer(connection)


def test_connection_is_closed_if_the_peer_answers_no_pings(service: ServiceProcess) -> None:
    """Else its streams and their reservations would stay as long as TCP has nothing to send."""
    with _connected(service) as peer:
        kinds = [kind for kind, _, _ in peer.frames()]

    assert kinds.count(_PING) == 1


def test_connection_stays_if_the_peer_answers_pings(service: ServiceProcess) -> None:
    """A stream may carry no data for as long as an engine computes."""
    asked = 0
    with _connected(service) as peer:
        for kind, flags, payload in peer.frames():
            assert kind != _GOAWAY
            if kind == _PING and not flags & _ACK:
                asked += 1
                peer.send_ping(data=payload, ack=True)
            if asked == _MORE_THAN_ALLOWED:
                break

    assert asked == _MORE_THAN_ALLOWED


def test_connection_stays_however_often_the_peer_pings(service: ServiceProcess) -> None:
    """The operator of Envoy chooses how often it pings."""
    answered = 0
    with _connected(service) as peer:
        peer.send_ping()
        for kind, flags, payload in peer.frames():
            assert kind != _GOAWAY, payload
            if kind == _PING and flags & _ACK:
                answered += 1
                peer.send_ping()
            if answered == _MORE_THAN_ALLOWED:
                break

    assert answered == _MORE_THAN_ALLOWED
