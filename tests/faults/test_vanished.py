"""Peers vanish without closing their connections, as when a machine is lost; a stopped process answers no pings."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from dp_extproc.lab.testbed.engine import EngineProcess
from faults.fleet import BODIES, Fleet, ask, asking, run_fleet
from patience import wait_for

CHAT, GENERATE = BODIES
_CLOSED_FOR_SILENCE = [f"cluster.{cluster}.http2.keepalive_timeout" for cluster in ("extproc", "extproc_owner")]
"""Connections that Envoy has closed because a ping was not answered."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with run_fleet(listen={"keepalive": "500ms"}) as fleet:
        yield fleet


@pytest.mark.parametrize("hangs", ["prefill", "decode"])
def test_reservations_end_when_an_envoy_vanishes(fleet: Fleet, hangs: str) -> None:
    """Its streams end, whichever leg they wait for, although it closes no connection."""
    engines = fleet.prefills if hangs == "prefill" else fleet.decodes
    with _hanging(fleet, engines), ExitStack() as clients:
        for path in [*BODIES] * 5:
            clients.enter_context(asking(fleet, path))
        wait_for(lambda: sum(len(engine.requests()) for engine in engines) == 10)
        assert fleet.reserved()
        os.kill(fleet.envoy.pid, signal.SIGSTOP)
        try:
            fleet.service.wait_until_idle()
            assert not fleet.reserved()
        finally:
            fleet.envoy.restart()


def test_envoy_continues_when_the_service_vanishes(fleet: Fleet) -> None:
    """Envoy closes its connections to the service, and continues with the responses that are held."""
    with _hanging(fleet, fleet.prefills), asking(fleet, GENERATE) as client:
        wait_for(lambda: any(engine.requests() for engine in fleet.decodes))
        fleet.service.send_signal(signal.SIGSTOP)
        try:
            wait_for(lambda: all(map(fleet.stat, _CLOSED_FOR_SILENCE)))
            assert client.recv(12) == b"HTTP/1.1 200"  # the headers, which are held while prefill has not answered
        finally:
            fleet.service.send_signal(signal.SIGCONT)


@contextmanager
def _hanging(fleet: Fleet, engines: Sequence[EngineProcess]) -> Iterator[None]:
    """Let engines hang, and restore them at the end."""
    fleet.forget()
    for engine in engines:
        engine.fault(inference="hang")
    try:
        yield
    finally:
        fleet.recover()
    wait_for(lambda: ask(fleet.client, CHAT, stream=True).complete)
    fleet.settle()
