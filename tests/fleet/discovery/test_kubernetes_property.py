"""Whatever happens between a source and its API server, its reports are states that existed, in their order."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.fleet.discovery.kubernetes.faults import ApiError
from dp_extproc.fleet.discovery.kubernetes.objects import Event, Page
from dp_extproc.fleet.discovery.kubernetes.reflector import Reflector, Timing
from dp_extproc.fleet.discovery.kubernetes.reports import MemberReports
from dp_extproc.fleet.discovery.kubernetes.slices import read_slice
from dp_extproc.fleet.discovery.source import Member
from kube_api import endpoint_slice

STEPS = ("put", "delete", "bookmark", "end", "break", "compact", "refuse")
"""What happens next: an object changes or goes, a line without a change, the watch ends or breaks, the history is
compacted, or the next request is refused."""


class World:
    """The API server of one script, and the listener of the source.

    Each step has whether the source sees it at once. Several that it does not see happen while no watch is open.
    """

    def __init__(self, steps: list[tuple[str, int, bool]]) -> None:
        self.over = asyncio.Event()
        self._steps = iter(steps)
        self._objects: dict[str, dict[str, object]] = {}
        self._version = self._oldest = 1
        self._log: list[tuple[int, bytes]] = []
        self._refuses = False
        self.states: list[frozenset[str]] = [frozenset()]
        self.reported: list[int] = []
        self.failures = 0

    async def page(self, parameters: dict[str, str]) -> Page:
        await asyncio.sleep(0)
        self._may_refuse()
        page = {"metadata": {"resourceVersion": str(self._version)}, "items": list(self._objects.values())}
        return msgspec.convert(msgspec.json.decode(json.dumps(page), type=Page), Page)

    async def events(self, parameters: dict[str, str]) -> AsyncGenerator[list[Event]]:
        await asyncio.sleep(0)
        self._may_refuse()
        position = int(parameters["resourceVersion"])
        if position < self._oldest:
            raise ApiError("410", expired=True)
        yield []
        while True:
            for line in [line for version, line in self._log if version > position]:
                yield [msgspec.json.decode(line, type=Event)]
            position, is_seen, is_away = self._version, False, False
            while not is_seen:
                is_away |= position != self._version
                kind, number, is_seen = next(self._steps, ("over", 0, True))
                self._happen(kind, number)
            if is_away or kind == "break":
                raise ApiError("broken", quiet=True)
            if kind == "over":
                self.over.set()
                await asyncio.sleep(3600)
            if kind == "end":
                return

    def snapshot(self, members: tuple[Member, ...]) -> None:
        """Find the state that is reported: the first one that is equal and not before the one reported before.

        States may repeat. If there is only an earlier one, the report is out of order.
        """
        urls = frozenset(each.url for each in members)
        equal = [index for index, state in enumerate(self.states) if state == urls]
        before = self.reported[-1] if self.reported else 0
        self.reported.append(next((index for index in equal if index >= before), equal[-1]))

    def failed(self, message: str) -> None:
        self.failures += 1

    def _may_refuse(self) -> None:
        refuses, self._refuses = self._refuses, False
        if refuses:
            raise ApiError("refused")

    def _happen(self, kind: str, number: int) -> None:
        name = f"decode-{number % 3}"
        if kind == "put":
            self._version += 1
            slice_ = endpoint_slice(name, "decode", f"10.0.0.{number}")
            slice_["metadata"]["resourceVersion"] = str(self._version)
            self._note("MODIFIED" if name in self._objects else "ADDED", slice_)
            self._objects[name] = slice_
        elif kind == "delete" and name in self._objects:
            self._version += 1
            self._note("DELETED", {"metadata": {"name": name, "resourceVersion": str(self._version)}})
            del self._objects[name]
        elif kind == "bookmark":
            self._version += 1
            self._note("BOOKMARK", {"metadata": {"resourceVersion": str(self._version)}})
        elif kind == "compact":
            self._version += 1
            self._oldest = self._version
        self._refuses |= kind == "refuse"
        urls = [f"http://{each['endpoints'][0]['addresses'][0]}:30000" for each in self._objects.values()]  # type: ignore[index]
        if frozenset(urls) != self.states[-1]:
            self.states.append(frozenset(urls))

    def _note(self, kind: str, manifest: dict[str, object]) -> None:
        self._log.append((self._version, json.dumps({"type": kind, "object": manifest}).encode()))


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 5), st.booleans()), max_size=40), st.integers())
def test_reports_are_states_in_their_order_up_to_the_last(steps: list[tuple[str, int, bool]], seed: int) -> None:
    """No fault clears what was found, brings back what was deleted, or loses a change."""

    async def story() -> World:
        world = World(steps)
        read = partial(read_slice, port=None, group_label=None)
        timing = Timing(first_pause=0.0, longest_pause=0.0, steady=0.0)
        reflector = Reflector(
            read, MemberReports("x", world), clock=lambda: 0.0, rng=random.Random(seed), timing=timing
        )

        @asynccontextmanager
        async def connect() -> AsyncIterator[World]:
            yield world

        running = asyncio.create_task(reflector.run(connect))
        await asyncio.wait_for(world.over.wait(), 10)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return world

    world = asyncio.run(story())
    assert world.reported == sorted(world.reported)
    assert world.states[world.reported[-1]] == world.states[-1]
