"""The source ``dns`` against a DNS server over UDP and TCP."""

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dp_extproc.config.discovery import DnsSettings
from dp_extproc.fleet.discovery.answers import Address, Answer
from dp_extproc.fleet.discovery.dns import DnsSource, make_resolver, missing_library, pause_after
from dp_extproc.fleet.discovery.dns_look_up import look_up_by_dns
from dp_extproc.fleet.discovery.look_up_thread import LookUpThread
from dp_extproc.fleet.discovery.source import Member
from dp_extproc.fleet.discovery.system_look_up import look_up_by_system
from fleet.discovery.dns_server import DnsServer, dns_server
from patience import wait_for
from source_reports import Reports, reports_of

SECONDS = 20.0
NAME = "decode.test"
SRV = f"_http._tcp.{NAME}"


@pytest.fixture
def server() -> Iterator[DnsServer]:
    with dns_server() as running:
        yield running


def settings(server: DnsServer | None = None, name: str = NAME, **more: object) -> DnsSettings:
    keys: dict[str, object] = {"name": name, "interval": "20ms"}
    keys |= {"type": "srv"} if name.startswith("_") else {"port": 30000}
    keys |= {"nameserver": f"127.0.0.1:{server.port}"} if server else {}
    return DnsSettings.model_validate(keys | more)


def addresses_in(members: Iterable[Member]) -> list[str]:
    return sorted(each.url.removeprefix("http://") for each in members)


def next_addresses(got: Reports) -> list[str]:
    """Wait for a snapshot of a look-up that begins from now on."""
    seen = len(got.snapshots)
    wait_for(lambda: len(got.snapshots) >= seen + 2, SECONDS)
    return addresses_in(got.snapshots[-1])


def test_source_follows_addresses_that_come_and_go(server: DnsServer) -> None:
    """A snapshot has every address, in whatever order, and an empty one is no failure."""
    with reports_of(DnsSource(settings(server, group="blue"))) as got:
        for addresses in (["10.0.0.1", "10.0.0.2"], ["10.0.0.4", "10.0.0.2", "10.0.0.3", "10.0.0.1"], ["10.0.0.3"]):
            server.set(NAME, "A", *addresses)
            assert next_addresses(got) == sorted(f"{each}:30000" for each in addresses)
            before = got.snapshots[-1]
            server.set(NAME, "A", *reversed(addresses))
            next_addresses(got)
            assert got.snapshots[-1] == before
        (member,) = got.snapshots[-1]
        assert (member.host, member.port, member.group) == ("10.0.0.3", 30000, "blue")
        server.set(NAME, "A")
        assert next_addresses(got) == []
        server.remove(NAME)
        assert next_addresses(got) == []
        assert got.failures == []


@pytest.mark.parametrize("fault", ["SERVFAIL", "REFUSED", "NOTIMP", "garbage", "silent"])
def test_source_reports_a_failure_when_the_server_gives_no_answer(server: DnsServer, fault: str) -> None:
    """The addresses are unknown then, which is not the same as none. Afterwards the source recovers."""
    server.set(NAME, "A", "10.0.0.1")
    server.fault = fault
    with reports_of(DnsSource(settings(server), seconds=0.2)) as got:
        reason = f"no answer of Do53:127.0.0.1@{server.port} within" if fault in {"silent", "garbage"} else fault
        # On a busy machine the first tries may end by the limit of the whole look-up.
        wait_for(lambda: sum(reason in each for each in got.failures) >= 2, SECONDS)
        assert got.snapshots == []
        assert all(NAME in each for each in got.failures)
        server.fault = ""
        wait_for(lambda: got.snapshots, SECONDS)
        assert addresses_in(got.snapshots[0]) == ["10.0.0.1:30000"]


def test_source_reports_a_failure_when_no_server_is_there(server: DnsServer) -> None:
    """A closed port refuses at once, over UDP by ICMP."""
    nowhere = settings(nameserver="127.0.0.1:9")
    with reports_of(DnsSource(nowhere, seconds=0.2)) as got:
        wait_for(lambda: got.failures, SECONDS)


def test_source_asks_again_over_tcp_when_the_answer_is_truncated(server: DnsServer) -> None:
    """A truncated answer has some of the addresses, and the others would seem to be gone."""
    addresses = [f"10.0.{number // 250}.{number % 250 + 1}" for number in range(500)]
    server.set(NAME, "A", *addresses)
    with reports_of(DnsSource(settings(server))) as got:
        next_addresses(got)
        assert {frozenset(addresses_in(each)) for each in got.snapshots} == {
            frozenset(f"{each}:30000" for each in addresses)
        }
        assert {transport for transport, *_ in server.queries} == {"udp", "tcp"}


def test_source_lists_an_engine_with_addresses_of_both_families_once(server: DnsServer) -> None:
    """IPv4 is preferred. IPv6 addresses are taken where there are no others, and have brackets in URLs."""
    server.set(NAME, "A", "10.0.0.1")
    server.set(NAME, "AAAA", "fd00::1", "fd00::2")
    with reports_of(DnsSource(settings(server))) as got:
        assert next_addresses(got) == ["10.0.0.1:30000"]
        server.set(NAME, "A")
        assert next_addresses(got) == ["[fd00::1]:30000", "[fd00::2]:30000"]
        assert {each.host for each in got.snapshots[-1]} == {"fd00::1", "fd00::2"}
        server.fault = "SERVFAIL"
        wait_for(lambda: got.failures, SECONDS)


@pytest.mark.parametrize("given", [0, 1, 3], ids=["none", "some", "all"])
def test_source_reads_srv_records_with_and_without_additional_records(server: DnsServer, given: int) -> None:
    """Targets have ports of their own. What the answer does not have is looked up; what it has is not."""
    server.additional = given
    server.set(SRV, "SRV", f"0 50 30001 d-0.{NAME}.", f"0 50 30002 d-0.{NAME}.", f"0 50 30001 d-1.{NAME}.",
               f"9 0 30003 d-2.{NAME}.", "0 0 0 .")  # fmt: skip
    server.set(f"d-0.{NAME}", "A", "10.0.0.1")
    server.set(f"d-0.{NAME}", "AAAA", "fd00::1")
    server.set(f"d-1.{NAME}", "A", "10.0.0.2", ttl=7)
    server.set(f"d-2.{NAME}", "AAAA", "fd00::3")
    answer = asyncio.run(make_resolver(settings(server, SRV)).look_up())
    assert sorted(answer.addresses) == [
        Address("10.0.0.1", 30001, f"d-0.{NAME}"),
        Address("10.0.0.1", 30002, f"d-0.{NAME}"),
        Address("10.0.0.2", 30001, f"d-1.{NAME}"),
        Address("fd00::3", 30003, f"d-2.{NAME}"),
    ]
    assert answer.ttl == 7
    asked = {name for _, name, kind in server.queries if kind != "SRV"}
    assert asked == {f"d-{number}.{NAME}" for number in range(given, 3)}

    with reports_of(DnsSource(settings(server, SRV))) as got:
        assert next_addresses(got) == [
            "10.0.0.1:30001", "10.0.0.1:30002", "10.0.0.2:30001", "[fd00::3]:30003",
        ]  # fmt: skip
        server.remove(SRV)
        assert next_addresses(got) == []


def test_source_reports_a_failure_when_a_target_of_many_is_unknown(server: DnsServer) -> None:
    """Otherwise an engine whose name is not answered at this moment would seem to be gone."""
    server.set(SRV, "SRV", *(f"0 0 30000 d-{number}.{NAME}." for number in range(40)))
    for number in range(40):
        server.set(f"d-{number}.{NAME}", "A", f"10.0.0.{number + 1}")
    with reports_of(DnsSource(settings(server, SRV))) as got:
        assert len(next_addresses(got)) == 40
        server.faulty, server.fault = f"d-17.{NAME}", "SERVFAIL"
        wait_for(lambda: got.failures, SECONDS)
        assert {len(each) for each in got.snapshots} == {40}
        assert f"d-17.{NAME}" in got.failures[0]
        # The records come in any order, but the log has a failure once.
        server.faulty = "d-"
        seen = len(got.failures)
        wait_for(lambda: len(got.failures) >= seen + 2, SECONDS)
        server.set(SRV, "SRV", *(f"0 0 30000 d-{number}.{NAME}." for number in reversed(range(40))))
        wait_for(lambda: len(got.failures) >= seen + 4, SECONDS)
        assert len(set(got.failures[seen + 1 :])) == 1
        # A target that does not exist is gone.
        server.fault = ""
        server.remove(f"d-17.{NAME}")
        assert len(next_addresses(got)) == 39


def test_resolver_follows_aliases_and_gives_the_shortest_ttl(server: DnsServer) -> None:
    """An answer is valid as long as each of its records."""
    server.set(NAME, "CNAME", "a.test.", ttl=300)
    server.set("a.test", "CNAME", "b.test.", ttl=4)
    server.set("b.test", "A", "10.0.0.1", ttl=60)
    assert asyncio.run(make_resolver(settings(server)).look_up()) == Answer((Address("10.0.0.1", 30000),), 4)


@pytest.mark.parametrize(
    ("ttl", "interval", "pause"),
    [(7, None, 7), (0, None, 1), (600, None, 30), (None, None, 5), (7, 0.5, 0.5), (None, 60, 60)],
)
def test_next_look_up_follows_the_ttl_within_bounds(ttl: float | None, interval: float | None, pause: float) -> None:
    """A configured interval is exact. Some DNS servers give TTLs of zero, and Docker's gives ten minutes."""
    assert pause_after(ttl, interval) == pause


def test_source_waits_for_the_ttl_between_two_look_ups(server: DnsServer) -> None:
    """Otherwise it would send a query all the time, or see changes late."""
    server.set(NAME, "A", "10.0.0.1", ttl=1)
    started = time.monotonic()
    with reports_of(DnsSource(settings(server, interval=None))) as got:
        wait_for(lambda: len(got.snapshots) == 2, SECONDS)
        assert time.monotonic() - started > 1


def test_local_names_have_precedence_over_dns(server: DnsServer, tmp_path: Path) -> None:
    """Programs read /etc/hosts first, and an operator may have overridden a name there."""
    names = tmp_path / "hosts"
    names.write_text(
        f"127.0.0.9 localhost # {NAME}\n10.9.0.1 x {NAME.upper()}\nfd00::9 {NAME}\n10.9.0.2\t{NAME} y\n\n#"
    )

    found = look_up_by_dns(settings(name=f"{NAME}."), 1, names)
    assert found == Answer((Address("10.9.0.1", 30000), Address("10.9.0.2", 30000)))
    server.set(NAME, "A", "10.0.0.1")
    found = look_up_by_dns(settings(server), 1, names)  # the DNS server is configured
    assert [each.host for each in found.addresses] == ["10.0.0.1"]


@pytest.mark.parametrize("literal", ["10.0.0.7", "fd00::7", "[fd00::7]"])
def test_an_address_in_place_of_a_name_is_one_member(literal: str) -> None:
    """A variable of a template may hold either."""
    with reports_of(DnsSource(settings(name=literal))) as got:
        bare = literal.strip("[]")
        assert next_addresses(got) == [f"[{bare}]:30000" if ":" in bare else f"{bare}:30000"]


class Fixed:
    """A resolver with an answer of many addresses."""

    def __init__(self, count: int) -> None:
        self.count = count

    async def look_up(self) -> Answer:
        return Answer(tuple(Address(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", 1) for i in range(self.count)) * 2)


@pytest.mark.parametrize("count", [4096, 4097])
def test_source_refuses_an_endless_answer(count: int) -> None:
    """The service would connect to each of the addresses."""
    with reports_of(DnsSource(settings(), Fixed(count))) as got:
        wait_for(lambda: got.snapshots or got.failures, SECONDS)
        assert [len(each) for each in got.snapshots[:1]] == ([4096] if count == 4096 else [])
        assert bool(got.failures) == (count > 4096)


# --- without dnspython ---


def test_look_up_by_system_reads_local_names() -> None:
    """It gives what other programs of this machine see."""
    assert set(look_up_by_system("localhost", 30000).addresses) == {Address("127.0.0.1", 30000)}


def answer_of(*addresses: str) -> list[tuple[Any, ...]]:
    """Give addresses as ``getaddrinfo`` does."""
    return [
        (socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 30000))
        for each in addresses
    ]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (answer_of("fd00::1", "10.0.0.1", "10.0.0.2"), ["10.0.0.1:30000", "10.0.0.2:30000"]),
        (answer_of("fd00::1"), ["[fd00::1]:30000"]),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), []),
        (socket.gaierror(socket.EAI_NODATA, "No address associated with hostname"), []),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), None),
        (socket.gaierror(socket.EAI_FAIL, "Non-recoverable failure"), None),
        (OSError(24, "Too many open files"), None),
        (UnicodeError("label too long"), None),
    ],
)
def test_look_up_by_system_distinguishes_no_address_from_a_failure(
    outcome: Any, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a look-up that worked may empty a role."""

    def get(*_: object, **__: object) -> list[tuple[Any, ...]]:
        if isinstance(outcome, Exception):
            raise outcome
        found: list[tuple[Any, ...]] = outcome
        return found

    monkeypatch.setattr(socket, "getaddrinfo", get)
    by_system = LookUpThread(NAME, partial(look_up_by_system, NAME, 30000))
    with reports_of(DnsSource(settings(), by_system)) as got:
        wait_for(lambda: got.snapshots or got.failures, SECONDS)
        assert [addresses_in(each) for each in got.snapshots[:1]] == ([] if expected is None else [expected])
        assert bool(got.failures) == (expected is None)


def test_source_keeps_one_call_that_hangs_and_takes_its_late_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls must not pile up, and the source reports the failure meanwhile."""
    calls, end = [], threading.Event()

    def get(*_: object, **__: object) -> list[tuple[Any, ...]]:
        calls.append(threading.current_thread())
        end.wait(SECONDS)
        return answer_of("10.0.0.1")

    monkeypatch.setattr(socket, "getaddrinfo", get)
    by_system = LookUpThread(NAME, partial(look_up_by_system, NAME, 30000))
    with reports_of(DnsSource(settings(), by_system, seconds=0.01)) as got:
        wait_for(lambda: len(got.failures) >= 3, SECONDS)
        assert NAME in got.failures[0]
        assert len(calls) == 1
        end.set()
        wait_for(lambda: got.snapshots, SECONDS)
        assert addresses_in(got.snapshots[0]) == ["10.0.0.1:30000"]
    assert calls[0].daemon


def test_source_recovers_when_the_machine_has_threads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that was not started must not be awaited."""
    by_system = LookUpThread(NAME, lambda: Answer((Address("10.0.0.1", 30000),)))
    start, is_full = threading.Thread.start, threading.Event()

    def start_if_possible(thread: threading.Thread) -> None:
        if is_full.is_set() and thread.name == f"look up {NAME}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_possible)
    is_full.set()
    with reports_of(DnsSource(settings(), by_system)) as got:
        wait_for(lambda: len(got.failures) >= 2, SECONDS)
        assert got.failures[0] == f"{NAME} cannot be resolved: can't start new thread"
        is_full.clear()
        assert next_addresses(got) == ["10.0.0.1:30000"]


def test_process_ends_while_a_look_up_hangs() -> None:
    """A thread pool would wait for the call."""
    code = """
import asyncio, time, uvloop
from dp_extproc.fleet.discovery.look_up_thread import LookUpThread

async def story():
    with __import__("contextlib").suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await LookUpThread("x", lambda: time.sleep(1000)).look_up()

uvloop.run(story())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)


# --- both look-ups, with the configuration of the system ---

IN_OWN_NAMESPACES = ("unshare", "--map-root-user", "--net", "--mount")
"""Port 53, and an own ``/etc/resolv.conf``."""
RESOLV_CONF = "nameserver 127.0.0.1\nsearch llm.test away.test\noptions ndots:5 timeout:20 attempts:1\n"
"""No case waits for the timeout, as the server answers all queries. With 1 s a busy machine sometimes fails."""
SCRIPT = """
import json
from dp_extproc.config.discovery import DnsSettings
from dp_extproc.fleet.discovery.dns_look_up import look_up_by_dns
from dp_extproc.fleet.discovery.system_look_up import look_up_by_system
from fleet.discovery.dns_server import dns_server

def look_up(name):
    for call in (lambda: look_up_by_system(name, 1), lambda: look_up_by_dns(DnsSettings(name=name, port=1), 20)):
        try:
            yield len(call().addresses)
        except Exception as error:
            yield "failure"

with dns_server(53) as server:
    server.set("decode.llm.test", "A", *(f"10.0.0.{i}" for i in range(200)))
    server.set("decode.llm.test", "AAAA", "fd00::1")
    server.set("empty.llm.test", "TXT", "x")
    server.set("away", "A", "10.0.0.1")
    server.fault, server.faulty = "SERVFAIL", "away.test"
    names = ("decode", "decode.llm.test", "decode.llm.test.", "decode.", "empty.llm.test.", "x.away.test.", "away", "x")
    print(json.dumps({name: list(look_up(name)) for name in names}))
"""


def test_both_look_ups_obey_the_configuration_of_the_system(tmp_path: Path) -> None:
    """The result must not depend on what is installed: search domains, an absolute name, TCP, no address, a failure.

    The DNS server of one search domain is away. In pods it may be one of the node's, outside of the cluster.
    """
    if subprocess.run([*IN_OWN_NAMESPACES, "true"], check=False, capture_output=True).returncode:
        pytest.skip("LEFT OUT: this user may not make network and mount namespaces")
    conf = tmp_path / "resolv.conf"
    conf.write_text(RESOLV_CONF)
    prepare = f'ip link set lo up && mount --bind {conf} /etc/resolv.conf && exec "$@"'
    argv = [*IN_OWN_NAMESPACES, "sh", "-c", prepare, "-", sys.executable, "-c", SCRIPT]
    path = {"PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "decode": [200, 200],
        "decode.llm.test": [200, 200],
        "decode.llm.test.": [200, 200],
        "decode.": [0, 0],
        "empty.llm.test.": [0, 0],
        "x.away.test.": ["failure", "failure"],
        "away": [1, 1],
        "x": ["failure", "failure"],
    }


# --- what is installed ---


def test_missing_library_names_the_extra(server: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are looked up without dnspython, SRV records and another DNS server are not."""
    assert [missing_library(each) for each in (settings(), settings(name=SRV), settings(server))] == [None] * 3
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dns" else find(name))
    assert missing_library(settings()) is None
    monkeypatch.setitem(sys.modules, look_up_by_dns.__module__, None)
    found = asyncio.run(make_resolver(settings(name="localhost")).look_up())
    assert [each.host for each in found.addresses][:1] == ["127.0.0.1"]
    for each, key in ((settings(name=SRV), "type: srv"), (settings(server), "nameserver")):
        assert missing_library(each) == f"{key} needs the library dnspython; install it: pip install dnspython"
