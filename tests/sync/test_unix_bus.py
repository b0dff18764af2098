"""Processes of one machine exchange messages through a directory, and none waits for one that does not read."""

import asyncio
import logging
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sync.hostile import hostile_messages
from sync.member import PATIENCE, Member, running, until
from sync.peer_requests import record_to
from sync.processes import MemberProcess


@pytest.fixture
def directory() -> Iterator[Path]:
    """Name a directory that is made on demand. Its path is short, as socket paths must be."""
    with tempfile.TemporaryDirectory(prefix="dp-") as parent:
        yield Path(parent) / "sync"


def sockets(directory: Path) -> list[str]:
    """List the names of the sockets."""
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not become so"
        time.sleep(0.01)


def test_processes_have_the_attempts_of_all_others(directory: Path) -> None:
    """Four real processes each have the open attempts of the other three, however they come and go."""
    with ExitStack() as stack:
        members = [stack.enter_context(MemberProcess(f"unix://{directory}", name)) for name in "abcd"]

        def agree() -> bool:
            states = [member.do("state") for member in members]
            return all(
                state["followed"] == sorted(number for other in states if other is not state for number in other["own"])
                for state in states
            )

        for number, member in enumerate(members):
            member.do("open", 10 * number)
            member.do("end", number)
        wait_until(agree)
        assert sum(len(member.do("state")["own"]) for member in members) == 54

        members[3].send_signal(signal.SIGKILL)
        del members[3]
        wait_until(agree)
        wait_until(lambda: len(sockets(directory)) == 3)  # the dead one's socket is removed

        members.append(stack.enter_context(MemberProcess(f"unix://{directory}", "e")))
        members[3].do("open", 5)
        wait_until(agree)


def test_stopped_process_blocks_no_other(directory: Path) -> None:
    """The others go on meanwhile; when it continues, it gets what it has missed."""

    async def story() -> None:
        a, b = Member(f"unix://{directory}", "a"), Member(f"unix://{directory}", "b")
        async with running(a, b):
            with MemberProcess(f"unix://{directory}", "stopped") as stopped:
                stopped.do("open", 1)
                await until(lambda: len(a.requests.open) == len(b.requests.open) == 1)
                stopped.send_signal(signal.SIGSTOP)
                await until(lambda: a.requests.open == [])  # its timeout is over
                for _ in range(300):  # far more than its queue and its sender's hold
                    a.open(20)
                    a.end(20)
                    await asyncio.sleep(0.005)
                a.open(2)
                await until(lambda: b.follows(a))
                stopped.send_signal(signal.SIGCONT)
                await until(lambda: stopped.do("state")["followed"] == sorted(a.own))
                await until(lambda: len(b.requests.open) == 3)

    asyncio.run(story())


def test_hostile_messages_are_counted(directory: Path) -> None:
    """Messages of peers are applied as before."""

    async def story() -> None:
        a, b = Member(f"unix://{directory}", "a"), Member(f"unix://{directory}", "b")
        hostile = hostile_messages(record_to(1))
        async with running(a, b):
            await until(lambda: sockets(directory) == ["a.sock", "b.sock"])
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outsider:
                for message in hostile:
                    outsider.sendto(message, str(directory / "b.sock"))
                    await asyncio.sleep(0)
            await until(lambda: b.replica.status().anomalies["undecodable"] == len(hostile))
            a.open(3)
            await until(lambda: b.follows(a))
            assert [peer.replica for peer in b.replica.status().peers] == ["a"]

    asyncio.run(story())


def test_large_snapshot_passes_a_small_queue(directory: Path) -> None:
    """It has more parts than the kernel queues for a socket."""

    async def story() -> None:
        first, second = Member(f"unix://{directory}", "first"), Member(f"unix://{directory}", "second")
        async with running(first):
            first.open(10_000)
            await until(lambda: first.replica.status().connected)
            async with running(second):
                await until(lambda: second.follows(first))

    asyncio.run(story())


def test_removed_socket_is_made_again(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The replica logs it, and is back."""
    caplog.set_level(logging.WARNING, "dp_extproc")

    async def story() -> None:
        a, b = Member(f"unix://{directory}", "a"), Member(f"unix://{directory}", "b")
        async with running(a, b):
            await until(lambda: sockets(directory) == ["a.sock", "b.sock"])
            (directory / "b.sock").unlink()
            await until(lambda: "the bus is back" in caplog.text)
            a.open(3)
            await until(lambda: b.follows(a))

    asyncio.run(story())

    assert "somebody has removed the socket" in caplog.text


def test_replica_removes_its_socket_at_the_end(directory: Path) -> None:
    """A replica that stops leaves no file."""

    async def story() -> None:
        async with running(Member(f"unix://{directory}", "a")):
            await until(lambda: sockets(directory) == ["a.sock"])

    asyncio.run(story())

    assert sockets(directory) == []


def test_directory_that_cannot_be_made_is_logged(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The replica goes on alone, and tries again."""
    directory.touch()  # a file of that name

    async def story() -> None:
        member = Member(f"unix://{directory}", "a")
        async with running(member):
            await until(lambda: "sync: no bus" in caplog.text)
            directory.unlink()  # noqa: ASYNC240 - nothing else is to be done
            await until(lambda: member.replica.status().connected)

    asyncio.run(story())


def test_socket_that_takes_no_messages_is_logged_once(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A replica that is not reached schedules without the load of this one. The others get messages as before."""
    caplog.set_level(logging.INFO)

    async def story() -> None:
        a, b = Member(f"unix://{directory}", "a"), Member(f"unix://{directory}", "b")
        async with running(a, b):
            await until(lambda: sockets(directory) == ["a.sock", "b.sock"])
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:  # no datagram can be sent to it
                other.bind(str(directory / "other.sock"))
                await until(lambda: a.replica.status().problem is not None)
                assert str(directory / "other.sock") in (a.replica.status().problem or "")
                scanned = a.replica.status().sent
                a.open(3)
                await until(lambda: b.follows(a) and a.replica.status().sent > scanned + 2)
            (directory / "other.sock").unlink()
            await until(lambda: a.replica.status().problem is b.replica.status().problem is None)

    asyncio.run(story())
    messages = [record.getMessage() for record in caplog.records]
    assert sum("some replicas get no messages" in message for message in messages) == 2  # one of each replica
    assert messages.count("sync: all replicas get messages again") == 2
