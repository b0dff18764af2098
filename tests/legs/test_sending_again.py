"""When a leg is sent again: only if no scheduler can have had it, and always with the same request id."""

import asyncio
import socket
import time

import pytest

from dp_extproc.attempt.events import LegBody, LegClosed, LegHeaders, LegUnseen, ToLeg
from dp_extproc.legs.client import RESEND_SECONDS
from dp_extproc.legs.listener import LegOutcome, ResendCause
from legs.engine import OK, Connection, Engine, Script, play, sender, serve_forever, until


def closed_port() -> int:
    """Give a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_leg_is_sent_until_the_engine_listens() -> None:
    """A restart of an engine takes a moment between two listeners."""

    async def story() -> None:
        port = closed_port()
        async with sender() as legs:
            leg = legs.start(f"127.0.0.1:{port}")
            await until(lambda: len(legs.counts.resent) == 2)
            async with Engine(port=port) as engine:
                await leg.closed()
                assert len(engine.requests) == 1
            assert set(legs.counts.resent) == {ResendCause.REFUSED}
            assert legs.counts.outcomes == [LegOutcome.ANSWERED]

    play(story())


def test_a_refused_leg_is_given_up_after_a_second() -> None:
    """The client waits meanwhile, and another endpoint may serve it."""

    async def story() -> None:
        async with sender() as legs:
            started = time.monotonic()
            (closed,) = await legs.send(f"127.0.0.1:{closed_port()}")

            assert isinstance(closed, LegClosed)
            assert "was not reached" in closed.problem
            assert 0.5 < time.monotonic() - started < RESEND_SECONDS + 1
            assert legs.counts.outcomes == [LegOutcome.REFUSED]
            assert 4 <= len(legs.counts.resent) <= 6

    play(story())


def test_cancellation_ends_sending_again() -> None:
    """Nothing follows a cancel, also in a pause."""

    async def story() -> None:
        port = closed_port()
        async with sender() as legs:
            leg = legs.start(f"127.0.0.1:{port}")
            await until(lambda: len(legs.counts.resent) == 2)
            leg.cancel()
            async with Engine(port=port) as engine:
                await leg.closed()
                await asyncio.sleep(0.3)
                assert engine.connections == 0
            assert legs.counts.outcomes == [LegOutcome.CANCELLED]

    play(story())


def cut_second(by: str, beginning: bytes = b"") -> Script:
    async def script(connection: Connection) -> None:
        await connection.answer()
        await connection.request()
        if beginning:
            await connection.say(beginning)
            await asyncio.sleep(0.02)
        connection.reset() if by == "reset" else connection.writer.close()

    return script


@pytest.mark.parametrize("by", ["reset", "close"])
def test_a_kept_connection_that_was_cut_is_replaced(by: str) -> None:
    """The engine closes it for idleness while the request is on its way."""

    async def story() -> None:
        async with Engine(cut_second(by), serve_forever) as engine, sender() as legs:
            await legs.send(engine.address)
            assert await legs.send(engine.address) == [LegHeaders(200)]

            assert legs.counts.resent == [ResendCause.STALE]
            bodies = [body for _, body in engine.requests]
            assert bodies[1] == bodies[2]

    play(story())


def test_a_leg_takes_no_second_kept_connection() -> None:
    """An engine that restarts leaves all of them dead."""

    async def story() -> None:
        async with Engine(*[cut_second("reset")] * 3, serve_forever) as engine, sender() as legs:
            await asyncio.gather(*(legs.start(engine.address).closed() for _ in range(3)))
            assert engine.connections == 3
            assert await legs.send(engine.address) == [LegHeaders(200)]

            assert legs.counts.resent == [ResendCause.STALE]
            assert engine.connections == 4

    play(story())


def test_a_leg_is_not_sent_again_after_a_byte_of_its_answer() -> None:
    """Then a scheduler has had it: a second one would meet a decode rank that is done with it, and hang."""

    async def story() -> None:
        async with Engine(cut_second("close", b"HTTP/1.1 20"), serve_forever) as engine, sender() as legs:
            await legs.send(engine.address)
            await legs.send(engine.address)

            assert "cut" in legs.problem
            assert legs.counts.resent == []

    play(story())


@pytest.mark.parametrize("by", ["reset", "close"])
def test_a_new_connection_that_was_cut_is_not_replaced(by: str) -> None:
    """No timeout of idleness explains it, so the engine may have died at work."""

    async def cut(connection: Connection) -> None:
        await connection.request()
        connection.reset() if by == "reset" else connection.writer.close()

    async def story() -> None:
        async with Engine(cut, serve_forever) as engine, sender() as legs:
            await legs.send(engine.address)

            assert "cut" in legs.problem
            assert len(engine.requests) == 1

    play(story())


def test_a_leg_that_was_cut_at_work_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idleness shows at once; who is cut later was at work."""
    monkeypatch.setattr("dp_extproc.legs.client.RESEND_SECONDS", 0.1)

    async def cut(connection: Connection) -> None:
        await connection.answer()
        await connection.request()
        await asyncio.sleep(0.2)
        connection.reset()

    async def story() -> None:
        async with Engine(cut, serve_forever) as engine, sender() as legs:
            await legs.send(engine.address)
            await legs.send(engine.address)

            assert "reset" in legs.problem
            assert legs.counts.resent == []

    play(story())


DUPLICATE = b'{"error":{"message":"Duplicate request ID detected: r"}}'
REFUSAL = b"HTTP/1.1 %d No\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"


def refuses(status: int, text: bytes) -> Script:
    return lambda connection: connection.answer(REFUSAL % (status, len(text), text))


def test_a_duplicate_of_the_own_leg_is_no_failure() -> None:
    """The engine had the first one after all, and computes it; only its answer is lost."""

    async def story() -> None:
        async with Engine(cut_second("reset"), refuses(400, DUPLICATE)) as engine, sender() as legs:
            await legs.send(engine.address)
            assert await legs.send(engine.address) == [LegUnseen()]

            assert legs.counts.outcomes == [LegOutcome.ANSWERED, LegOutcome.UNSEEN]

    play(story())


@pytest.mark.parametrize("text", [DUPLICATE, b'{"error":"bad"}'])
def test_a_refusal_of_the_first_leg_is_the_client_s(text: bytes) -> None:
    """A client may repeat a request id by itself."""

    async def story() -> None:
        async with Engine(refuses(400, text)) as engine, sender() as legs:
            legs.wants = ToLeg.BUFFER_BODY
            assert await legs.send(engine.address) == [LegHeaders(400), LegBody(text, True)]

    play(story())


@pytest.mark.parametrize("status", [502, 503])
def test_an_error_of_a_proxy_is_a_refusal(status: int) -> None:
    """A sidecar answers so while its engine does not listen."""

    async def story() -> None:
        async with Engine(refuses(status, b"no healthy upstream"), serve_forever) as engine, sender() as legs:
            assert await legs.send(engine.address) == [LegHeaders(200)]
            assert legs.counts.resent == [ResendCause.UNAVAILABLE]

            async with Engine(refuses(status, b"no healthy upstream")) as other:
                legs.wants = ToLeg.BUFFER_BODY
                assert await legs.send(other.address) == [LegHeaders(status), LegBody(b"no healthy upstream", True)]

    play(story())


@pytest.mark.parametrize("status", [500, 502, 503])
def test_an_error_of_the_engine_is_final(status: int) -> None:
    """Its scheduler may have had the request."""
    text = b'{"error":{"message":"overloaded"}}'

    async def story() -> None:
        async with Engine(refuses(status, text)) as engine, sender() as legs:
            legs.wants = ToLeg.BUFFER_BODY
            assert await legs.send(engine.address) == [LegHeaders(status), LegBody(text, True)]
            assert len(engine.requests) == 1

    play(story())


def test_an_error_of_a_proxy_without_end_is_final() -> None:
    """Its status is enough after a second."""

    async def endless(connection: Connection) -> None:
        await connection.answer(OK.replace(b"200 OK", b"503 No").replace(b": 2", b": 9"))
        await connection.left()

    async def story() -> None:
        async with Engine(endless) as engine, sender() as legs:
            await legs.send(engine.address, rest_timeout=0.1)

            assert legs.events[1] == LegHeaders(503)
            assert len(engine.requests) == 1

    play(story())
