"""Prefill legs of the service between real gateway streams and a real engine socket: nothing of them is left behind."""

import asyncio
import gc
import json
import re
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, Final

import grpc
import pytest
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as Mode
from msgspec.structs import replace

from dp_extproc.attempt.attempt import Attempt
from dp_extproc.config.reliability import SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.extproc.direct_leg import ABORT_PATH, DirectLegs
from dp_extproc.observability.leg_metrics import SentLegMetrics
from dp_extproc.scheduling.decision import Decision, LegAbort, SchedulingResult
from dp_extproc.scheduling.encoder import LegSettings
from extproc.wire import POST, Server, Stream, request_body, request_headers, response_headers, run_server
from fleet_fixtures import Fleet, make_facts
from legs.engine import OK, Connection, Engine, play
from patience import wait_for

SUPERVISION: Final = SupervisionSettings.model_validate({"mode": "legs", "prefill_timeout": "1s"})
KEY: Final = {**POST, "authorization": "Bearer client"}
FAULTS: Final = ("none", "500", "reset", "hang", "noise")


class Site:
    """A fleet of one pair, whose endpoints have the address of the engine."""

    def __init__(self, address: str) -> None:
        self.fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
        self.metrics = SentLegMetrics()
        self._scheduler = self.fleet.make_scheduler(legs=LegSettings(sends_prefill=True))
        self._address = address

    def place(self, *args: Any) -> SchedulingResult:
        found = self._scheduler.place(*args)
        assert isinstance(found, Decision)
        assert found.prefill is not None
        assert found.abort is not None
        prefill, abort = replace(found.prefill, address=self._address), replace(found.abort, addresses=(self._address,))
        return replace(found, prefill=prefill, abort=abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def legs(self, prefill_timeout: float = 1.0) -> DirectLegs:
        return DirectLegs(prefill_timeout, listener=self.metrics.legs, abort_listener=self.metrics.aborts)

    @property
    def reservations(self) -> int:
        return sum(self.fleet.endpoint(role).reservations for role in (Role.PREFILL, Role.DECODE))


async def serve(connection: Connection) -> None:
    """Do what the field ``user`` of each request names. Aborts are answered."""
    while True:
        head = await connection.head()
        (length,) = re.findall(rb"content-length: (\d+)", head)
        body = await connection.reader.readexactly(int(length))
        if ABORT_PATH.encode() in head:
            await connection.say(OK)
            continue
        fault = json.loads(body).get("user", "none")
        del body
        match fault:
            case "hang":
                await connection.left()
                return
            case "reset":
                connection.reset()
                return
            case "noise":
                await connection.say(b"\x00\x01\x02\r\n\r\n")
                return
            case "500":
                await connection.say(OK.replace(b"200 OK", b"500 No"))
            case _:
                await connection.say(OK)


def with_engine(story: Callable[[str], None]) -> None:
    """Run the story, which blocks, beside an engine; it gets the address."""

    async def run() -> None:
        async with Engine(serve) as engine:
            await asyncio.to_thread(story, engine.address)

    play(run())


def ask(server: Server, fault: str, mode: Mode = Mode.FULL_DUPLEX_STREAMED, padding: int = 0) -> Stream:
    stream = server.stream()
    body = json.dumps({"prompt": "hello", "user": fault, "padding": "x" * padding}).encode()
    stream.send(request_headers(KEY, mode=mode), request_body(body))
    return stream


def attempts() -> int:
    """Count the attempts that are remembered anywhere."""
    gc.collect()
    return sum(isinstance(each, Attempt) for each in gc.get_objects())


def finish(stream: Stream) -> None:
    stream.receive()
    stream.send(response_headers())
    stream.close()


def skip(stream: Stream) -> None:
    stream.receive()
    stream.close()


def leave(stream: Stream) -> None:
    stream.receive()
    stream.cancel()


MANNERS: Final = {
    "gateways that send response headers": (finish, leave, Stream.cancel),
    "gateways that do not": (skip, Stream.cancel),
}


@pytest.mark.parametrize("manners", MANNERS.values(), ids=MANNERS)
def test_nothing_is_left_of_requests(manners: Sequence[Callable[[Stream], object]]) -> None:
    """Neither reservations nor tasks, legs in flight, or attempts, however the engine and the gateway behave."""

    def story(address: str) -> None:
        site = Site(address)
        with run_server(site, supervision=SUPERVISION, picks=True, legs=site.legs) as server:
            before = server.tasks()
            asked = [(ask(server, fault), manner) for fault, manner in product(FAULTS, manners) for _ in range(3)]
            for stream, manner in asked:
                with suppress(grpc.RpcError):  # the stream of a gateway that has left
                    manner(stream)
            del asked, stream
            metrics = site.metrics
            wait_for(lambda: site.reservations == metrics.legs.in_flight == metrics.aborts.in_flight == 0)
            wait_for(lambda: server.tasks() == before)
            wait_for(lambda: attempts() <= 1)  # gRPC keeps the last stream
            assert server.watcher.opened == server.watcher.closed == len(FAULTS) * len(manners) * 3

    with_engine(story)


def test_aborts_of_a_batch_are_limited_at_a_time() -> None:
    """Each has a connection of its own while it waits, and a batch may have thousands of prompts."""
    batch: Final = 300
    aborts = SentLegMetrics().aborts
    most = 0

    async def count(connection: Connection) -> None:
        nonlocal most
        while True:
            await connection.request()
            most = max(most, aborts.in_flight)
            await connection.say(OK)

    async def run() -> None:
        async with Engine(count) as engine:
            legs = DirectLegs(1.0, abort_listener=aborts)
            ids = tuple(map(str, range(batch)))
            legs.abort(LegAbort("pool", (engine.address,), ids, (), precedes_close=True))
            await legs.all_ended()
            assert len(engine.requests) == 2 * batch, "each is tried twice"
            await legs.close()

    play(run())
    assert 0 < most < batch


def test_abort_has_the_key_of_the_client() -> None:
    """As the legs have it, where the pool has none of its own; and a stop of the process waits for it."""
    keys: list[bytes] = []

    async def refuse(connection: Connection) -> None:
        while True:
            await connection.request()
            await connection.say(OK.replace(b"200 OK", b"500 No"))

    async def run() -> None:
        async with Engine(refuse) as engine:
            await asyncio.to_thread(story, engine.address)
            keys.extend(head for head, _ in engine.requests if ABORT_PATH.encode() in head)

    def story(address: str) -> None:
        site = Site(address)
        with run_server(site, supervision=SUPERVISION, picks=True, legs=site.legs) as server:
            ask(server, "none").close()
            server.leave()

    play(run())
    assert len(keys) == 2
    assert all(b"\r\nauthorization: Bearer client\r\n" in head for head in keys)


WAITING: Final = 16


def traced() -> int:
    """Give the bytes that are in use, but for those that the gateway of the test keeps."""
    found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "*/betterproto2/*")])
    return sum(trace.size for trace in found.traces)


@pytest.mark.parametrize("mode", [Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED], ids=["duplex", "buffered"])
def test_bodies_are_not_kept_while_prefill_computes(mode: Mode) -> None:
    """Once a leg is sent, a request that waits for it needs little memory, however large its body is."""
    size = 1 << 20

    def story(address: str) -> None:
        site = Site(address)
        patient = SupervisionSettings.model_validate({"mode": "legs", "prefill_timeout": "60s"})
        with run_server(site, supervision=patient, picks=True, legs=partial(site.legs, 60.0)) as server:
            tracemalloc.start()
            try:
                asked = [ask(server, "hang", mode, size) for _ in range(WAITING)]
                for stream in asked:
                    stream.receive()
                wait_for(lambda: site.metrics.legs.in_flight == WAITING)
                wait_for(lambda: traced() < WAITING * size // 8)
            finally:
                tracemalloc.stop()
            for stream in asked:
                stream.cancel()

    with_engine(story)
