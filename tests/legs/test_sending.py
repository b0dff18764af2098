"""Prefill legs through real sockets: what is sent, what is reported, and what becomes of connections."""

import asyncio
import gc
import ssl
import subprocess
import weakref
from pathlib import Path
from typing import Final

import pytest

from dp_extproc.attempt.events import LegBody, LegClosed, LegHeaders, LegOpened, ToLeg
from dp_extproc.config import EngineTls
from dp_extproc.legs import transport
from dp_extproc.legs.listener import LegOutcome
from dp_extproc.runtime.engine_tls import engine_context
from ipv6 import needs_ipv6
from legs.engine import OK, PREAMBLE, TAIL, Connection, Engine, play, sender, until

EVENTS: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ERROR: Final = b"HTTP/1.1 500 Error\r\ncontent-length: 3\r\n\r\nbad"


def test_request_has_its_own_headers_and_both_parts_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes from the environment, from an earlier response or from the library."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HOME", "/nonexistent")
    cookie = OK.replace(b"content-type", b"set-cookie: a=b\r\ncontent-type")

    async def answers(connection: Connection) -> None:
        while True:
            await connection.answer(cookie)

    async def story() -> None:
        async with Engine(answers) as engine, sender() as legs:
            for _ in range(2):
                headers = (("content-type", b"application/json"), ("authorization", b"Bearer k"))
                assert await legs.send(engine.address, path="/v1/x?a=%20b", headers=headers) == [LegHeaders(200)]

            head, body = engine.requests[1]
            assert body == PREAMBLE + TAIL
            line, *sent = head.rstrip().decode().split("\r\n")
            assert line == "POST /v1/x?a=%20b HTTP/1.1"
            assert sorted(sent) == [
                "accept-encoding: identity",
                "authorization: Bearer k",
                f"content-length: {len(body)}",
                "content-type: application/json",
                f"host: {engine.address}",
            ]
            assert legs.counts.outcomes == [LegOutcome.ANSWERED] * 2
            assert engine.connections == 1

    play(story())


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 5_000_000])
def test_bodies_of_all_sizes_arrive(size: int) -> None:
    """Small ones are joined, and large ones are not."""
    tail = bytes(index % 251 for index in range(min(size, 1000))) * (size // 1000 + 1)

    async def story() -> None:
        async with Engine() as engine, sender() as legs:
            await legs.send(engine.address, tail=memoryview(tail)[:size])

            assert engine.requests[0][1] == PREAMBLE + tail[:size]

    play(story())


@pytest.mark.parametrize(
    ("wants", "expected"),
    [
        (ToLeg.PROCEED, []),
        (ToLeg.BUFFER_BODY, [LegBody(b"onetwo", True)]),
        (ToLeg.STREAM_BODY, [LegBody(b"one", False), LegBody(b"two", False), LegBody(b"", True)]),
    ],
)
def test_body_is_reported_as_it_was_asked_for(wants: ToLeg, expected: list[LegBody]) -> None:
    """What no command asks for is read and discarded, so that the connection can be used again."""

    async def story() -> None:
        first = asyncio.Event()

        async def answers(connection: Connection) -> None:
            await connection.request()
            await connection.say(EVENTS + b"3\r\none\r\n")
            await first.wait()
            await connection.say(b"3\r\ntwo\r\n0\r\n\r\n")
            await connection.answer()

        async with Engine(answers) as engine, sender() as legs:
            legs.wants = wants
            leg = legs.start(engine.address)
            await until(lambda: len(legs.events) == (3 if wants is ToLeg.STREAM_BODY else 2))
            first.set()
            await leg.closed()
            await asyncio.sleep(0)

            assert legs.events == [LegOpened(), LegHeaders(200, is_events=True), *expected, LegClosed()]
            legs.wants = ToLeg.PROCEED
            assert await legs.send(engine.address) == [LegHeaders(200)]
            assert engine.connections == 1

    play(story())


def test_text_that_is_cut_short_is_reported_as_far_as_it_came() -> None:
    """It may have the reason."""

    async def cut(connection: Connection) -> None:
        await connection.answer(ERROR.replace(b"3", b"9"))
        await asyncio.sleep(0.05)  # a reset discards what was not read yet
        connection.reset()

    async def story() -> None:
        async with Engine(cut) as engine, sender() as legs:
            legs.wants = ToLeg.BUFFER_BODY
            events = await legs.send(engine.address)

            assert events[:2] == [LegHeaders(500), LegBody(b"bad", True)]
            assert "cut" in legs.problem

    play(story())


def test_connections_are_kept_for_less_time_than_engines_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uvicorn closes a connection after 5 s, perhaps while the next request is on its way."""
    assert transport.KEEPALIVE_SECONDS < 5
    monkeypatch.setattr(transport, "KEEPALIVE_SECONDS", 0.1)

    async def story() -> None:
        async with Engine() as engine, sender() as legs:
            await legs.send(engine.address)
            await legs.send(engine.address)
            assert engine.connections == 1
            await engine.ended[0].wait()
            await legs.send(engine.address)
            assert engine.connections == 2

    play(story())


def test_legs_do_not_wait_for_each_other() -> None:
    """A leg may take as long as its prefill, so any limit on connections would be a deadlock."""

    async def story() -> None:
        everyone = asyncio.Event()

        async def waits(connection: Connection) -> None:
            await connection.request()
            if len(engine.requests) == 150:
                everyone.set()
            await everyone.wait()
            await connection.say(OK)

        async with Engine(waits, backlog=200) as engine, sender() as legs:
            await asyncio.gather(*(legs.start(engine.address).closed() for _ in range(150)))

            assert legs.counts.outcomes == [LegOutcome.ANSWERED] * 150

    play(story())


@pytest.mark.parametrize("steps", [*range(12), 1000])
def test_cancellation_at_any_moment_closes_the_connection(steps: int) -> None:
    """The engine ends a request when its connection closes, and no half of a response stays for the next leg."""

    async def story() -> None:
        async def half(connection: Connection) -> None:
            await connection.answer(OK.replace(b"2\r\n", b"900000\r\n"))
            await connection.left()

        async with Engine(half) as engine, sender() as legs:
            leg = legs.start(engine.address, tail=bytes(2_000_000))
            for _ in range(steps):
                await asyncio.sleep(0)
            before = len(legs.events)
            leg.cancel()
            await leg.closed()
            await asyncio.sleep(0)

            assert legs.events[before:] == [LegClosed()]
            has_headers = any(isinstance(event, LegHeaders) for event in legs.events)
            assert legs.counts.outcomes == [LegOutcome.ANSWERED if has_headers else LegOutcome.CANCELLED]
            await asyncio.gather(*(ended.wait() for ended in engine.ended))
            before = engine.connections
            leg = legs.start(engine.address)
            await until(lambda: engine.connections > before)
            leg.cancel()
            await leg.closed()

    play(story())


def test_a_listener_may_cancel_or_fail() -> None:
    """Either ends this leg alone."""

    async def story() -> None:
        async with Engine() as engine, sender() as legs:
            legs.wants = ToLeg.CANCEL
            assert await legs.send(engine.address) == [LegHeaders(200)]

            legs.wants = None  # type: ignore[assignment]
            events = []

            def fails(event: object) -> None:
                events.append(event)
                raise RuntimeError

            await legs.client.send(legs.request(engine.address), fails).closed()
            assert len(legs.client) == 0
            assert events == [LegOpened(), LegClosed()]

    play(story())


def test_closing_cancels_the_legs_in_flight() -> None:
    """Nothing of them is left when the process ends."""

    async def story() -> None:
        async with Engine(Connection.left) as engine, sender() as legs:
            legs.start(engine.address)
            await until(lambda: engine.connections == 1)
            await legs.client.close()

            assert legs.counts.outcomes == [LegOutcome.CANCELLED]
            await engine.ended[0].wait()

    play(story())


def test_memory_of_a_large_body_is_freed_while_prefill_computes() -> None:
    """Prefill of a long prompt takes a long time, and many legs wait at once."""

    class Buffer(bytearray):
        """It can have weak references."""

    async def story() -> None:
        async with Engine(lambda connection: connection.request()) as engine, sender() as legs:
            buffer = Buffer(4_000_000)
            freed = weakref.ref(buffer)
            leg = legs.start(engine.address, tail=memoryview(buffer))
            del buffer
            while freed() is not None:
                await asyncio.sleep(0.01)
                gc.collect()
            leg.cancel()
            await leg.closed()

    play(story())


@needs_ipv6
def test_legs_reach_ipv6_addresses() -> None:
    """An address stands in brackets, as everywhere in the service."""

    async def story() -> None:
        async with Engine(host="::1") as engine, sender() as legs:
            assert await legs.send(engine.address) == [LegHeaders(200)]
            assert f"host: {engine.address}".encode() in engine.requests[0][0]

    play(story())


def test_tls_checks_the_certificate(tmp_path: Path) -> None:
    """An engine with another certificate gets nothing, and is not asked again."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=engine"
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", certificate, "-addext", "subjectAltName=DNS:engine.test"],
        check=True,
        capture_output=True,
    )
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate, key)

    def trusting(name: str) -> ssl.SSLContext | None:
        return engine_context(EngineTls.model_validate({"ca": str(certificate), "names": [name]}))

    async def story() -> None:
        async with Engine(ssl=own) as engine, sender() as legs:
            context = trusting("engine.test")
            assert await legs.send(engine.address, tls=context) == [LegHeaders(200)]
            assert await legs.send(engine.address, tls=context) == [LegHeaders(200)]
            assert engine.connections == 1

            for other in (trusting("other.test"), ssl.create_default_context()):
                await legs.send(engine.address, tls=other)
                assert "certificate" in legs.problem
            assert legs.counts.resent == []
            assert len(engine.requests) == 2

    play(story())
