"""Replicas on a real Redis server have the attempts of their peers, whatever happens to the server."""

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
from sync.hostile import hostile_messages
from sync.member import Member, in_background, running, until
from sync.peer_requests import record_to
from sync.processes import MemberProcess, RedisProcess, redis_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    """Run a server for one test."""
    with redis_server(tmp_path) as running_server:
        yield running_server


def has_sent_more_than(member: Member, messages: int) -> bool:
    """Check whether a replica has sent more messages by now."""
    return member.replica.status().sent > messages


def open_files() -> int:
    """Count the files and connections of this process."""
    return len(list(Path("/dev/fd").iterdir()))


def test_replicas_have_the_attempts_of_all_peers(server: RedisProcess) -> None:
    """Placed and ended attempts of each reach all others, and no replica gets its own."""

    async def story() -> None:
        members = a, b, c = [Member(server.url, name) for name in "abc"]
        async with running(*members):
            await until(lambda: all(len(member.replica.status().peers) == 2 for member in members))
            lost = a.replica.status().lost
            for member in members:
                member.open(50)
                member.end(20)
            await until(lambda: a.follows(b, c) and b.follows(a, c) and c.follows(a, b))
            status = a.replica.status()
            assert status.connected
            assert sorted((peer.replica, peer.requests) for peer in status.peers) == [("b", 30), ("c", 30)]
            assert (status.lost, status.last_error) == (lost, None)

    asyncio.run(story())


def test_new_replica_gets_all_open_attempts(server: RedisProcess) -> None:
    """It requests snapshots, which come in parts if they are large."""

    async def story() -> None:
        first, second = Member(server.url, "first"), Member(server.url, "second")
        async with running(first):
            await until(lambda: first.replica.status().connected)
            first.open(3000)
            await until(lambda: first.replica.status().sent > 1)
            async with running(second):
                await until(lambda: second.follows(first))

    asyncio.run(story())


def test_replicas_survive_a_restart_of_the_server_under_load(
    server: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """They go on alone, log once each that the bus is lost and back, and are complete again."""
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
                await until(lambda: not any(member.requests.open for member in members))  # after the peer timeout
                server.start()
                await until(lambda: all(member.replica.status().connected for member in members))
                await until(lambda: all(len(member.requests.open) > 100 for member in members))
            await until(lambda: a.follows(b, c) and b.follows(a, c) and c.follows(a, b))
            assert all(member.replica.status().lost > 0 for member in members)

    asyncio.run(story())

    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "sync: no bus" in line]) == 3
    assert len([line for line in lines if "the bus is back" in line]) == 3
    assert len(lines) == 6


def test_connection_is_replaced_if_the_server_hangs(server: RedisProcess) -> None:
    """A connection that is open, but delivers nothing, counts as lost."""

    async def story() -> None:
        a, b = Member(server.url, "a", 1.0), Member(server.url, "b", 1.0)
        async with running(a, b):
            a.open(5)
            await until(lambda: b.follows(a))
            server.send_signal(signal.SIGSTOP)
            await until(lambda: not a.replica.status().connected and not b.replica.status().connected)
            await until(lambda: b.requests.open == [])
            server.send_signal(signal.SIGCONT)
            await until(lambda: b.follows(a))

    asyncio.run(story())


def test_attempts_end_if_their_replica_is_killed(server: RedisProcess) -> None:
    """A new process of its kind is another replica."""

    async def story() -> None:
        survivor = Member(server.url, "survivor", 1.0)
        async with running(survivor):
            with MemberProcess(server.url, "victim") as victim:
                victim.do("open", 7)
                await until(lambda: len(survivor.requests.open) == 7)
                victim.send_signal(signal.SIGKILL)
                await until(lambda: survivor.requests.open == [])
            with MemberProcess(server.url, "successor") as successor:
                successor.do("open", 2)
                await until(lambda: len(survivor.requests.open) == 2)

    asyncio.run(story())


def test_replica_stops_whenever_it_is_cancelled(server: RedisProcess) -> None:
    """The client alone swallows some cancellations."""

    async def story() -> None:
        members = [Member(server.url, str(number)) for number in range(40)]
        tasks = [asyncio.create_task(member.replica.run()) for member in members]
        await until(lambda: all(member.replica.status().connected for member in members))
        for member, task in zip(members, tasks, strict=True):
            member.open()
            await until(partial(has_sent_more_than, member, member.replica.status().sent))
            task.cancel()
        await until(lambda: all(task.done() for task in tasks))

    asyncio.run(story())


def test_replica_detects_lost_messages(server: RedisProcess) -> None:
    """Sequence numbers show them, and a snapshot closes the gap."""

    async def story() -> None:
        a, b = Member(server.url, "a"), Member(server.url, "b")
        async with running(a, b):
            a.open(5)
            await until(lambda: b.follows(a))
            a.end(2)
            a.open(1)
            a.outbox.collect(0.0)  # and these messages are lost
            await until(lambda: b.follows(a))
            assert b.replica.status().anomalies["gap"] == 1

    asyncio.run(story())


def test_messages_of_other_programs_are_counted(server: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    """Garbage and messages of another version are logged once, and dropped."""

    async def story() -> None:
        member = Member(server.url, "a")
        async with running(member):
            await until(lambda: member.replica.status().connected)
            async with redis.asyncio.Redis(port=server.port) as outsider:
                for _ in range(3):
                    await outsider.publish("dp-extproc", b"hello")
                    await outsider.publish("dp-extproc", b"dpx" + bytes([VERSION + 1]))
            await until(lambda: member.replica.status().anomalies["version_mismatch"] == 3)
            assert member.replica.status().anomalies["undecodable"] == 3

    asyncio.run(story())

    assert len([record for record in caplog.records if "something on the bus" in record.getMessage()]) == 2


def test_hostile_messages_are_counted(server: RedisProcess) -> None:
    """The bus stays, and messages of peers are applied as before."""

    async def story() -> None:
        members = a, b = Member(server.url, "a"), Member(server.url, "b")
        hostile = hostile_messages(record_to(1))
        async with running(*members):
            await until(lambda: all(len(member.replica.status().peers) == 1 for member in members))
            async with redis.asyncio.Redis(port=server.port) as outsider:
                for message in hostile:
                    await outsider.publish("dp-extproc", message)
            await until(
                lambda: all(member.replica.status().anomalies["undecodable"] == len(hostile) for member in members)
            )
            a.open(3)
            await until(lambda: b.follows(a))
            assert [member.replica.status().last_error for member in members] == [None, None]
            assert [len(member.replica.status().peers) for member in members] == [1, 1]

    asyncio.run(story())


def test_password_is_used_and_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a wrong password the log names the remedy."""

    async def story(port: int) -> None:
        right = [Member(f"redis://:s%40cret@127.0.0.1:{port}", name) for name in "ab"]
        wrong = Member(f"redis://:hunter2@127.0.0.1:{port}", "c")
        async with running(*right, wrong):
            right[0].open()
            await until(lambda: right[1].follows(right[0]))
            await until(lambda: wrong.replica.status().last_error is not None)
            error = wrong.replica.status().last_error
            assert error is not None
            assert "refuses the user or the password of sync.url" in error

    with redis_server(tmp_path, "--requirepass", "s@cret") as locked:
        asyncio.run(story(locked.port))

    assert "refuses" in caplog.text
    assert "hunter2" not in caplog.text
    assert "s@cret" not in caplog.text


def test_tls_verifies_the_server(tmp_path: Path) -> None:
    """Without the server's certificate the server is not trusted."""
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
            await until(lambda: trusting[1].follows(trusting[0]))
            await until(lambda: "CERTIFICATE_VERIFY_FAILED" in (doubting.replica.status().last_error or ""))
        # A connection with TLS is closed only when the server has said goodbye, which the client does not wait for.
        await until(lambda: open_files() == open_before)

    with redis_server(tmp_path, *tls.split()):
        asyncio.run(story())


def test_user_needs_rights_for_the_channel_alone(server: RedisProcess) -> None:
    """Without the right to publish and subscribe the reason names it."""

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
            await until(lambda: right[1].follows(right[0]))
            await until(lambda: wrong.replica.status().last_error is not None)
            assert "does not let this user publish and subscribe" in (wrong.replica.status().last_error or "")

    asyncio.run(story())


def test_unreachable_server_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The log has its address, but no password."""

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
