"""Responses of engines that are early, incomplete, endless or no HTTP: none hangs, and none fills the memory."""

import asyncio
from collections.abc import Iterator
from itertools import count, repeat
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_extproc.attempt.events import LegBody, LegClosed, LegHeaders, ToLeg
from dp_extproc.legs.client import ERROR_BYTES
from dp_extproc.legs.listener import LegOutcome
from legs.engine import OK, Connection, Engine, Script, play, sender

LARGE: Final = memoryview(bytes(8 << 20))
CHUNKED: Final = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TOO_LARGE: Final = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\n%s\r\nbig"
ENDLESS: Final[dict[str, tuple[bytes, Iterator[bytes]]]] = {
    "headers": (b"HTTP/1.1 200 OK\r\n", (b"x-%d: a\r\n" % number * 20 for number in count())),
    "header": (b"HTTP/1.1 200 OK\r\nx: ", repeat(b"a" * 65_536)),
    "status line": (b"HTTP/1.1 200 ", repeat(b"a" * 65_536)),
    "body in chunks": (CHUNKED, repeat(b"10000\r\n" + b"a" * 65_536 + b"\r\n")),
    "body without length": (b"HTTP/1.1 200 OK\r\n\r\n", repeat(b"a" * 65_536)),
    "trailers": (CHUNKED + b"0\r\n", (b"x-%d: a\r\n" % number * 20 for number in count())),
    "chunk extension": (CHUNKED + b"1;", repeat(b"a" * 65_536)),
    "informational responses": (b"", repeat(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 50)),
}
"""What each kind of endless response begins with, and how it goes on."""


def resident() -> int:
    """Give the memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4 // 1024


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_answer_ends_within_limits(kind: str) -> None:
    """An engine can send what it likes for as long as it likes."""
    start, rest = ENDLESS[kind]

    async def endless(connection: Connection) -> None:
        await connection.request()
        await connection.say(start)
        for piece in rest:
            await connection.say(piece)

    async def story() -> None:
        async with Engine(endless) as engine, sender() as legs:
            before = resident()
            await legs.send(engine.address, timeout=1.0, rest_timeout=1.0)

            assert legs.problem
            assert resident() - before < 40
            assert legs.counts.outcomes[0] in {LegOutcome.UNREADABLE, LegOutcome.TIMEOUT}
            await engine.ended[0].wait()

    play(story())


@pytest.mark.parametrize("wants", [ToLeg.BUFFER_BODY, ToLeg.STREAM_BODY])
def test_text_of_an_endless_error_is_truncated(wants: ToLeg) -> None:
    """Its beginning has the reason."""

    async def endless(connection: Connection) -> None:
        await connection.answer(CHUNKED.replace(b"200 OK", b"500 No"))
        while True:
            await connection.say(b"10000\r\n" + b"a" * 65_536 + b"\r\n")

    async def story() -> None:
        async with Engine(endless) as engine, sender() as legs:
            legs.wants = wants
            await legs.send(engine.address)

            if wants is ToLeg.BUFFER_BODY:
                assert len(legs.body()) == ERROR_BYTES
                assert legs.problem == ""
            else:
                assert len(legs.body()) >= 64 << 20
                assert "larger than" in legs.problem

    play(story())


async def early(connection: Connection, answer: bytes) -> None:
    await connection.head()
    await connection.say(answer)


async def answers_and_closes(connection: Connection) -> None:
    await early(connection, TOO_LARGE % b"connection: close\r\n")


async def answers_and_resets(connection: Connection) -> None:
    await early(connection, TOO_LARGE % b"")
    await asyncio.sleep(0.02)
    connection.reset()


async def answers_and_reads_on(connection: Connection) -> None:
    await early(connection, TOO_LARGE % b"")
    await connection.left()


async def answers_and_reads_no_more(connection: Connection) -> None:
    await early(connection, TOO_LARGE % b"")
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    "script", [answers_and_closes, answers_and_resets, answers_and_reads_on, answers_and_reads_no_more]
)
def test_an_answer_before_the_end_of_the_body_is_reported(script: Script) -> None:
    """An engine refuses a body by its first bytes, or by the headers; what was not sent yet is not needed."""

    async def story() -> None:
        async with Engine(script) as engine, sender() as legs:
            legs.wants = ToLeg.BUFFER_BODY

            assert await legs.send(engine.address, tail=LARGE) == [LegHeaders(413), LegBody(b"big", True)]
            await legs.send(engine.address)
            assert engine.connections == 2  # half of a body is still on the way in the first

    play(story())


def test_every_beginning_of_an_answer_ends_the_leg() -> None:
    """A connection may be cut at each byte. Only the whole response is one."""

    async def story() -> None:
        answer = OK.replace(b"content-length: 2", b"transfer-encoding: chunked").replace(b"{}", b"2\r\n{}\r\n0\r\n\r\n")
        scripts = [cut(answer[:length], by) for by in ("close", "reset") for length in range(len(answer))]
        async with Engine(*scripts) as engine, sender() as legs:
            legs.wants = ToLeg.STREAM_BODY
            for _ in scripts:
                events = await legs.send(engine.address)
                assert isinstance(events[-1], LegClosed)
                assert "cut" in legs.problem or "no HTTP" in legs.problem
            assert engine.connections == len(scripts)  # none was sent again
            assert legs.counts.resent == []

    play(story())


def cut(beginning: bytes, by: str) -> Script:
    async def script(connection: Connection) -> None:
        await connection.request()
        if beginning:
            await connection.say(beginning)
        await asyncio.sleep(0)
        connection.reset() if by == "reset" else connection.writer.close()

    return script


@settings(max_examples=60)
@given(st.binary(max_size=80), st.integers(0, len(OK)))
def test_any_bytes_end_the_leg(noise: bytes, keeps: int) -> None:
    """Whatever an engine sends, the leg ends when the connection does."""

    async def noisy(connection: Connection) -> None:
        await connection.answer(OK[:keeps] + noise)

    async def story() -> None:
        async with Engine(noisy) as engine, sender() as legs:
            legs.wants = ToLeg.STREAM_BODY
            await legs.send(engine.address, timeout=5.0)

            assert legs.counts.outcomes != [LegOutcome.TIMEOUT]

    play(story())


@pytest.mark.parametrize("status", [b"101 Switching Protocols", b"204 No Content", b"307 Temporary Redirect", b"600 X"])
def test_a_status_that_answers_nothing_is_no_success(status: bytes) -> None:
    """A redirect would lead to an engine that was not picked, so it is not followed."""
    answer = b"HTTP/1.1 %s\r\nlocation: /other\r\nupgrade: h2c\r\ncontent-length: 0\r\n\r\n" % status

    async def story() -> None:
        async with Engine(lambda connection: connection.answer(answer)) as engine, sender() as legs:
            events = await legs.send(engine.address)

            assert len(engine.requests) == 1
            assert not any(isinstance(event, LegHeaders) and event.status < 400 for event in events) or b"204" in status

    play(story())


def test_informational_responses_are_skipped() -> None:
    """The final response counts."""

    async def story() -> None:
        answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + OK
        async with Engine(lambda connection: connection.answer(answer)) as engine, sender() as legs:
            assert await legs.send(engine.address) == [LegHeaders(200)]

    play(story())


def test_an_engine_that_reads_nothing_meets_the_timeout() -> None:
    """Then no more than what the sockets hold was sent."""

    async def story() -> None:
        async with Engine(lambda _: asyncio.sleep(60)) as engine, sender() as legs:
            await legs.send(engine.address, tail=LARGE, timeout=0.3)

            assert legs.counts.outcomes == [LegOutcome.TIMEOUT]

    play(story())
