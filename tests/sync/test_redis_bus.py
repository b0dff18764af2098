"""Replicas on a real Redis server: what one sends the others know, whatever becomes of the server."""

import asyncio
import logging
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
import redis.asyncio

from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.sync.messages import VERSION
from sync.books import dispatch_to
from sync.hostile import hostile_messages
from sync.member import Member, in_background, running, until
from sync.processes import MemberProcess, RedisProcess, redis_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server of this test alone."""
    with redis_server(tmp_path) as running_server:
        yield running_server


def has_told_more_than(member: Member, messages: int) -> bool:
    """Tell whether a replica has sent something by now."""
    return member.replica.status().sent > messages


def open_files() -> int:
    """Count the files and connections of this process."""
    return len(list(Path("/dev/fd").iterdir()))


def test_what_one_sends_the_others_know(server: RedisProcess) -> None:
    """Dispatches and ends of each reach all others, and nobody's own come back to it."""

    async def story() -> None:
        members = a, b, c = [Member(server.url, name) for name in "abc"]
        async with running(*members):
            await until(lambda: all(len(member.replica.status().peers) == 2 for member in members))
            lost = a.replica.status().lost
            for member in members:
                member.open(50)
                member.end(20)
            await until(lambda: a.knows(b, c) and b.knows(a, c) and c.knows(a, b))
            status = a.replica.status()
            assert status.connected
            assert sorted((peer.replica, peer.requests) for peer in status.peers) == [("b", 30), ("c", 30)]
            assert (status.lost, status.last_error) == (lost, None)

    asyncio.run(story())


def test_who_comes_later_learns_what_was_before(server: RedisProcess) -> None:
    """A newcomer asks the others, who tell it all they have open, in parts if it is much."""

    async def story() -> None:
        first, second = Member(server.url, "first"), Member(server.url, "second")
        async with running(first):
            await until(lambda: first.replica.status().connected)
            first.open(3000)
            await until(lambda: first.replica.status().sent > 1)
            async with running(second):
                await until(lambda: second.knows(first))

    asyncio.run(story())


def test_the_server_is_killed_and_comes_back_under_load(server: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    """The replicas go on alone, say once each that the bus is lost and back, and then know everything again."""
    caplog.set_level(logging.WARNING, "dp_extproc")

    async def story() -> None:
        members = a, b, c = [Member(server.url, name) for name in "abc"]
        async with running(*members):
            await until(lambda: all(member.replica.status().connected for member in members))
            async with AsyncExitStack() as work:
                for member in members:
                    await work.enter_async_context(in_background(member.work()))
                await until(lambda: all(len(member.own) > 50 for member in members))
                server.kill()
                await until(lambda: not any(member.replica.status().connected for member in members))
                await until(lambda: not any(member.books.open for member in members))  # after the silence
                server.start()
                await until(lambda: all(member.replica.status().connected for member in members))
                await until(lambda: all(len(member.books.open) > 100 for member in members))
            await until(lambda: a.knows(b, c) and b.knows(a, c) and c.knows(a, b))
            assert all(member.replica.status().lost > 0 for member in members)

    asyncio.run(story())

    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "sync: no bus" in line]) == 3
    assert len([line for line in told if "the bus is back" in line]) == 3
    assert len(told) == 6


def test_a_server_that_hangs_is_left(server: RedisProcess) -> None:
    """A connection that is open but through which nothing comes counts as lost, and is made anew."""

    async def story() -> None:
        a, b = Member(server.url, "a", 1.0), Member(server.url, "b", 1.0)
        async with running(a, b):
            a.open(5)
            await until(lambda: b.knows(a))
            server.send_signal(signal.SIGSTOP)
            await until(lambda: not a.replica.status().connected and not b.replica.status().connected)
            await until(lambda: b.books.open == [])
            server.send_signal(signal.SIGCONT)
            await until(lambda: b.knows(a))

    asyncio.run(story())


def test_a_peer_that_is_killed_takes_its_load_along(server: RedisProcess) -> None:
    """What a dead process had on its books is taken off everybody's; a new one of its kind is another replica."""

    async def story() -> None:
        survivor = Member(server.url, "survivor", 1.0)
        async with running(survivor):
            with MemberProcess(server.url, "victim") as victim:
                victim.do("open", 7)
                await until(lambda: len(survivor.books.open) == 7)
                victim.send_signal(signal.SIGKILL)
                await until(lambda: survivor.books.open == [])
            with MemberProcess(server.url, "successor") as successor:
                successor.do("open", 2)
                await until(lambda: len(survivor.books.open) == 2)

    asyncio.run(story())


def test_a_replica_stops_whatever_it_is_doing(server: RedisProcess) -> None:
    """Cancelled amid its work with the server, each of many replicas ends; the client alone swallows some of these."""

    async def story() -> None:
        members = [Member(server.url, str(number)) for number in range(40)]
        tasks = [asyncio.create_task(member.replica.run()) for member in members]
        await until(lambda: all(member.replica.status().connected for member in members))
        for member, task in zip(members, tasks, strict=True):
            member.open()
            await until(partial(has_told_more_than, member, member.replica.status().sent))
            task.cancel()
        await until(lambda: all(task.done() for task in tasks))

    asyncio.run(story())


def test_messages_that_were_dropped_are_noticed(server: RedisProcess) -> None:
    """Who misses a message sees it by the numbers, asks, and knows again."""

    async def story() -> None:
        a, b = Member(server.url, "a"), Member(server.url, "b")
        async with running(a, b):
            a.open(5)
            await until(lambda: b.knows(a))
            a.end(2)
            a.open(1)
            a.outbox.collect(0.0)  # and nobody ever sees it
            await until(lambda: b.knows(a))
            assert b.replica.status().anomalies["gap"] == 1

    asyncio.run(story())


def test_others_on_the_channel_do_no_harm(server: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    """Garbage and messages of another version are counted, told once, and left out."""

    async def story() -> None:
        member = Member(server.url, "a")
        async with running(member):
            await until(lambda: member.replica.status().connected)
            async with redis.asyncio.Redis(port=server.port) as stranger:
                for _ in range(3):
                    await stranger.publish("dp-extproc", b"hello")
                    await stranger.publish("dp-extproc", b"dpx" + bytes([VERSION + 1]))
            await until(lambda: member.replica.status().anomalies["version_mismatch"] == 3)
            assert member.replica.status().anomalies["undecodable"] == 3

    asyncio.run(story())

    assert len([record for record in caplog.records if "something on the bus" in record.getMessage()]) == 2


def test_hostile_messages_do_no_harm(server: RedisProcess) -> None:
    """Each is counted; the bus stays, and what others have to tell is heard as before."""

    async def story() -> None:
        members = a, b = Member(server.url, "a"), Member(server.url, "b")
        hostile = hostile_messages(dispatch_to(1))
        async with running(*members):
            await until(lambda: all(len(member.replica.status().peers) == 1 for member in members))
            async with redis.asyncio.Redis(port=server.port) as stranger:
                for message in hostile:
                    await stranger.publish("dp-extproc", message)
            await until(
                lambda: all(member.replica.status().anomalies["undecodable"] == len(hostile) for member in members)
            )
            a.open(3)
            await until(lambda: b.knows(a))
            assert [member.replica.status().last_error for member in members] == [None, None]
            assert [len(member.replica.status().peers) for member in members] == [1, 1]

    asyncio.run(story())


def test_a_password_is_used_and_never_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the right one replicas talk; with a wrong one the log names the remedy, not the password."""

    async def story(port: int) -> None:
        right = [Member(f"redis://:s%40cret@127.0.0.1:{port}", name) for name in "ab"]
        wrong = Member(f"redis://:hunter2@127.0.0.1:{port}", "c")
        async with running(*right, wrong):
            right[0].open()
            await until(lambda: right[1].knows(right[0]))
            await until(lambda: wrong.replica.status().last_error is not None)
            error = wrong.replica.status().last_error
            assert error is not None
            assert "refuses the user or the password of sync.url" in error

    with redis_server(tmp_path, "--requirepass", "s@cret") as locked:
        asyncio.run(story(locked.port))

    assert "refuses" in caplog.text
    assert "hunter2" not in caplog.text
    assert "s@cret" not in caplog.text


def test_tls_checks_who_the_server_is(tmp_path: Path) -> None:
    """With the server's certificate replicas talk; without it the server is not trusted."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed; it makes the certificate")
    key, certificate, port = tmp_path / "key.pem", tmp_path / "certificate.pem", free_port()
    make = f"{openssl} req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -subj /CN=redis -days 2"
    subprocess.run([*make.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    tls = f"--tls-port {port} --tls-cert-file {certificate} --tls-key-file {key} --tls-auth-clients no"

    async def story() -> None:
        url = f"rediss://127.0.0.1:{port}"
        trusting = [Member(f"{url}?ssl_ca_certs={certificate}", name) for name in "ab"]
        doubting = Member(url, "c")
        open_before = open_files()
        async with running(*trusting, doubting):
            trusting[0].open()
            await until(lambda: trusting[1].knows(trusting[0]))
            await until(lambda: "CERTIFICATE_VERIFY_FAILED" in (doubting.replica.status().last_error or ""))
        # A connection with TLS is closed only when the server has said goodbye, which the client does not wait for.
        await until(lambda: open_files() == open_before)

    with redis_server(tmp_path, *tls.split()):
        asyncio.run(story())


def test_a_user_needs_no_more_rights_than_it_uses(server: RedisProcess) -> None:
    """Publishing and subscribing to the channel is enough; without that right the reason says so."""

    async def story() -> None:
        async with redis.asyncio.Redis(port=server.port) as admin:
            for user, channel in (("right", "dp-extproc"), ("wrong", "other")):
                await admin.acl_setuser(
                    user,
                    enabled=True,
                    passwords=["+password"],
                    channels=[channel],
                    commands=["+publish", "+subscribe"],
                    reset=True,
                )
        right = [Member(f"redis://right:password@127.0.0.1:{server.port}", name) for name in "ab"]
        wrong = Member(f"redis://wrong:password@127.0.0.1:{server.port}", "c")
        async with running(*right, wrong):
            right[0].open()
            await until(lambda: right[1].knows(right[0]))
            await until(lambda: wrong.replica.status().last_error is not None)
            assert "does not let this user publish and subscribe" in (wrong.replica.status().last_error or "")

    asyncio.run(story())


def test_nobody_there(caplog: pytest.LogCaptureFixture) -> None:
    """A server that was never reached is told once, with its address."""

    async def story() -> None:
        member = Member(f"redis://:hunter2@127.0.0.1:{free_port()}", "a")
        async with running(member):
            member.open()
            await until(lambda: member.replica.status().lost > 2)
            assert not member.replica.status().connected

    asyncio.run(story())

    (line,) = [record.getMessage() for record in caplog.records if "sync:" in record.getMessage()]
    assert "127.0.0.1" in line
    assert "hunter2" not in line
