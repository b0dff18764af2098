"""Engines that come and go for weeks leave nothing behind in any component."""

import asyncio
import gc
import json
import random
from collections.abc import Iterator
from logging import Logger
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Final

from grpc_health.v1.health import aio

from dp_extproc.background import Guard
from dp_extproc.config import parse_config
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, LoadPage, Role
from dp_extproc.fleet.discovery.roster import DEBOUNCE_SECONDS
from dp_extproc.fleet.discovery.source import Member
from dp_extproc.load.records import PlacementRecord, RequestCost
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Rejection
from dp_extproc.runtime.components import Components
from dp_extproc.scheduling.decision import Decision, RequestContext
from fleet_fixtures import Clock, address_of, make_facts, samples

CONFIG = """
listen: {grpc: "127.0.0.1:0", admin: "127.0.0.1:0"}
queue: {}
pools:
- models: ["*"]
  prefill: {kubernetes: {service: prefill}}
  decode: {kubernetes: {service: decode}}
"""
GONE = "rotating"
"""Part of each text by which an endpoint is named: its URL, uid, name and revision group."""


def member(role: Role, number: int) -> Member:
    name = f"{GONE}-{role.value}-{number}"
    return Member(f"http://{name}:1", name, 1, uid=f"uid-{name}", name=name, group=f"{GONE}-v{number}")


class Rotation:
    """All components of a process whose engines are replaced, one of each role at a time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.components = Components(
            parse_config(CONFIG),
            aio.HealthServicer(),
            owner="127.0.0.1:1",
            clock=self.clock,
            rng=random.Random(1),
            guard=Guard(),
        )
        self.roster = self.components._discovery.roster
        self.decisions: list[Decision] = []

    def report(self, *numbers: int) -> None:
        """Let the sources report the engines of some numbers, and let new ones be read."""
        for key, source in self.roster.sources.items():
            self.roster.snapshot(key, tuple(member(source.place.role, number) for number in numbers))
        self.apply()
        for endpoint in self.roster.endpoints:
            self.read(endpoint)
        self.apply()

    def apply(self) -> None:
        self.clock.now += DEBOUNCE_SECONDS
        if (change := self.roster.advance(self.clock())) is not None:
            self.components._changed(change)
        self.components._discovery_log.review(self.roster)

    def read(self, endpoint: Endpoint) -> None:
        listeners, now = self.components._monitor._listeners, self.clock()
        listeners.failed(endpoint, EngineFailure(FailureKind.REFUSED, f"no connection to {endpoint.host}"), now)
        listeners.discovered(endpoint, address_of(endpoint), make_facts(endpoint.role), now)
        for _ in range(2):
            listeners.sampled(endpoint, LoadPage(samples([0] * 4), prompt_tokens=5), now, now)

    def request(self, number: int) -> None:
        """Send a request of this replica, and one of a peer, and end the one before: its engine has left by then."""
        body = json.dumps({"text": f"prompt {number} " * 400}).encode()
        decision = self.components._scheduler.place(Api.GENERATE, body, RequestContext(session=f"session {number}"))
        assert isinstance(decision, Decision)
        self.decisions.append(decision)
        prefill, decode = (member(role, number).url for role in (Role.PREFILL, Role.DECODE))
        record = PlacementRecord("*", RequestCost(100.0, session=f"peer {number}"), decode, 1, prefill, 1)
        self.components._scheduler.tracker.open_peer(record, self.clock()).end(self.clock())
        if len(self.decisions) > 1:
            self.end_oldest()

    def end_oldest(self) -> None:
        in_flight = self.decisions.pop(0).in_flight
        assert in_flight is not None
        in_flight.prefill_answered(200, self.clock())
        in_flight.first_byte(200, self.clock())
        in_flight.end(self.clock())


_ELSEWHERE: Final = (ModuleType, type, BuiltinFunctionType, Logger)


def reachable(root: object) -> Iterator[object]:
    """Find all data that an object leads to, without what modules, classes and loggers have."""
    seen, left = {id(root)}, [root]
    while left:
        yield (each := left.pop())
        found = [each.__closure__, each.__defaults__] if isinstance(each, FunctionType) else gc.get_referents(each)
        for other in found:
            if id(other) not in seen and not isinstance(other, _ELSEWHERE):
                seen.add(id(other))
                left.append(other)


def left_behind(root: object) -> list[str]:
    return [each for each in reachable(root) if isinstance(each, str) and GONE in each]


def test_endpoints_that_are_gone_leave_nothing_in_any_component() -> None:
    """Whatever holds data by endpoint, engine, rank or revision group would grow without limit."""

    async def story() -> None:
        rotation = Rotation()
        for number in range(200):
            rotation.report(number)
            rotation.request(number)
            await rotation.components.metrics()
            await rotation.components.loads()
        assert left_behind(rotation.components)
        rotation.end_oldest()
        rotation.report()
        rotation.clock.now += 1000
        rotation.apply()
        assert rotation.roster.endpoints == ()
        refused = rotation.components._scheduler.place(Api.GENERATE, b'{"text": "x"}')  # computes what is cached anew
        assert isinstance(refused, Rejection)
        assert left_behind(rotation.components) == []

    asyncio.run(story())
