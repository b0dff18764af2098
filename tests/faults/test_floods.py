"""Streams with many bytes before their first event, which end in the middle of it, crash neither service nor Envoy."""

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from e2e.stack import FAST
from faults.fleet import BODIES, Fleet, ask, asking, run_fleet
from faults.matrix import KINDS
from patience import wait_for

CHAT, GENERATE = BODIES
MEBIBYTE: Final = 1 << 20
BURST: Final = 25_000_000
_PAUSED: Final = "cluster.decode.upstream_flow_control_paused_reading_total"
"""How often Envoy has stopped reading responses because it cannot forward them."""
PAUSE: Final = 3.0
"""Seconds between the head of a stream and its flood, in which the service is stopped."""
TEXTS: Final = {
    "comments": ": x\n\n",
    "pings": 'event: ping\ndata: {"type":"ping"}\n\n',
    "empty lines": "\n",
    "one line": "x",
}


@pytest.fixture(scope="module", params=["buffered", "none"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Give a fleet that watches first events, and one that also holds response headers."""
    without_bodies = request.param == "none"
    with run_fleet(
        ("--header-overrides", *FAST) if without_bodies else FAST,
        of_pool={"routing_fields": "headers", "policy": {"affinity": {"prefixes": False}}} if without_bodies else {},
        envoy={"body_mode": request.param},
        supervision={"mode": "first_event", "prefill_timeout": "3s", "first_token_timeout": "3s"},
        retry={"attempts": 2, "budget": 1.0},
        outlier_detection={"consecutive_failures": 1000},  # requests have to meet every flood
        load={"interval": "100ms", "stale_after": "20s", "timeout": "5s"},
    ) as fleet:
        for path, stream in KINDS:
            ask(fleet.client, path, stream=stream)
        yield fleet


@dataclass
class Flooded:
    """The result of a client of a stream."""

    leaves_after: float = float("inf")
    """Bytes after which the client disconnects; may be changed while it reads."""
    status: int | None = None
    size: int = 0
    end: bytes = b""
    """The last bytes of the stream."""

    def read(self, fleet: Fleet, path: str) -> None:
        """Request a stream, and read it to its end, or until the client is to disconnect."""
        body = {**BODIES[path], "stream": True}
        with loopback.client(fleet.envoy.url) as client, client.stream("POST", path, json=body) as answer:
            self.status = answer.status_code
            for chunk in answer.iter_raw():
                self.size += len(chunk)
                self.end = (self.end + chunk)[-100:]
                if self.size >= self.leaves_after:
                    return


@contextmanager
def _flooding(fleet: Fleet, role: str = "decode", **fault: Any) -> Iterator[None]:
    """Let one stream of each engine of a role begin with a flood.

    At the end the fleet works as before, with the same Envoy.
    """
    pid = fleet.envoy.pid
    fleet.forget()
    engines = fleet.decodes if role == "decode" else fleet.prefills
    for engine in engines:
        engine.fault(inference={"kind": "flood", "times": 1, **fault})
    try:
        yield
    finally:
        for engine in engines:
            engine.heal()
    fleet.settle()
    assert fleet.envoy.is_running
    assert fleet.envoy.pid == pid
    assert ask(fleet.client, CHAT, stream=True).complete


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_stream_arrives_whole_with_a_burst_before_its_first_event(fleet: Fleet, text: str, path: str) -> None:
    """The stream counts as begun after 64 KiB without an event, and the client gets all of it."""
    with _flooding(fleet, text=text, size=BURST):
        flooded = Flooded()
        flooded.read(fleet, path)

    assert flooded.status == 200
    assert flooded.size > BURST
    assert flooded.end.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_other_requests_are_served_during_an_endless_flood(fleet: Fleet, text: str, path: str) -> None:
    """Its client disconnects in the end, and all the while other clients get their responses."""
    flooded, enough = Flooded(), 3 * MEBIBYTE
    with _flooding(fleet, text=text):
        reading = fleet.threads.submit(flooded.read, fleet, path)
        wait_for(lambda: flooded.size > enough)
        outcomes = {kind: str(ask(fleet.client, kind[0], stream=kind[1])) for kind in KINDS}
        size = flooded.size
        wait_for(lambda: flooded.size > size + enough)
        flooded.leaves_after = 0
        reading.result()

    assert outcomes == dict.fromkeys(KINDS, "answer")
    assert flooded.status == 200


def test_a_flood_behind_held_headers_ends_with_the_attempt(fleet: Fleet) -> None:
    """Envoy's buffers are full of the flood when the attempt ends because of prefill."""
    for engine in fleet.prefills:
        engine.fault(inference="hang")
    try:
        with _flooding(fleet, times=None):
            outcome = ask(fleet.client, GENERATE, stream=True)
            for engine in fleet.prefills:
                engine.heal()
    finally:
        for engine in fleet.prefills:
            engine.heal()

    assert str(outcome) == "504 prefill_timeout"


def _client_leaves(fleet: Fleet, client: socket.socket, _engines: Sequence[EngineProcess]) -> None:
    client.close()
    wait_for(lambda: fleet.stat("http.inference.downstream_rq_active") == 0)


def _engine_dies(fleet: Fleet, _client: socket.socket, engines: Sequence[EngineProcess]) -> None:
    (failing,) = [engine for engine in engines if engine.requests()]
    failing.stop(signal.SIGKILL)
    failing.start()
    failing.wait_until_listening()
    fleet.service.send_signal(signal.SIGCONT)
    fleet.wait_until_fresh()


def _service_dies(fleet: Fleet, client: socket.socket, _engines: Sequence[EngineProcess]) -> None:
    fleet.service.stop(signal.SIGKILL)
    client.recv(1)  # the response is not held any more
    fleet.restart_service()


def _service_goes_on(fleet: Fleet, client: socket.socket, _engines: Sequence[EngineProcess]) -> None:
    fleet.service.send_signal(signal.SIGCONT)
    client.recv(1)


ENDINGS: Final = {
    "the client leaves": _client_leaves,
    "the engine dies": _engine_dies,
    "the service dies": _service_dies,
    "the service goes on": _service_goes_on,
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_envoy_survives_a_flood_that_the_service_does_not_read(
    fleet: Fleet, ending: Callable[[Fleet, socket.socket, Sequence[EngineProcess]], None]
) -> None:
    """Envoy has read as much as it can without forwarding when the request ends, for each way to end."""
    with _flooding(fleet, seconds=PAUSE), asking(fleet, GENERATE) as client:
        wait_for(lambda: any(engine.requests() for engine in fleet.decodes))
        paused = fleet.stat(_PAUSED)
        fleet.service.send_signal(signal.SIGSTOP)
        try:
            wait_for(lambda: fleet.stat(_PAUSED) > paused)
            ending(fleet, client, fleet.decodes)
        finally:
            fleet.service.send_signal(signal.SIGCONT)
