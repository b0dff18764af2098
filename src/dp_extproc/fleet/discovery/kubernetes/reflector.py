"""Keeps a copy of some objects of an API server: lists them once, then watches changes.

1. The first list comes from the cache of the API server (version 0). A watch goes on from the version of the list, and
   each event and bookmark moves the version. So a watch that ends, or breaks, loses nothing.
2. A version that is too old (410, as a status or as an ``ERROR`` event) or too new leads to a new list. It is of the
   present state and in one piece, because also the token of a page can be too old.
3. No fault clears what is kept: it stays as it is until the next list or event, however long that takes.
4. A watch that is silent counts as broken: the API server sends a bookmark about once a minute.
5. Pauses after faults double, and have full jitter, so that the clients of an API server do not return all at once. A
   watch that stayed open for a while makes them short again: a load balancer may cut idle connections every 20 s.
6. A failure ends with a change, with a list whose watch opens, or with a watch that stays open for a while. That a
   watch opens is not enough, as something else may answer there. A list alone is not enough either: the right to watch
   may be missing.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from dp_extproc.fleet.discovery.kubernetes.faults import ApiError
from dp_extproc.fleet.discovery.kubernetes.kubeconfig import AccessError
from dp_extproc.fleet.discovery.kubernetes.objects import Event, Meta, Object, Page

_PAGE_OBJECTS: Final = 250
"""Objects of one page of a list, where the API server reads pages. From its cache it answers in one piece: the decoder
takes 10 ms for a thousand pods of 11 kB, and 1 ms for ten thousand endpoints in slices.
"""
_TURN: Final = 100
"""Objects and members that are read before other tasks get their turn. That takes 1 to 5 ms."""

_OBJECT: Final = msgspec.json.Decoder(Object)


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the reflector waits, in seconds; the values of client-go, Kubernetes' own library, unless noted."""

    watch: tuple[float, float] = (300.0, 600.0)
    """The API server ends each watch after a time in this range."""
    line_timeout: float = 150.0
    """The longest time without a line: more than two bookmarks are missed then. client-go pings by HTTP/2 instead."""
    first_pause: float = 0.8
    """Bound of the pause after the first fault."""
    longest_pause: float = 30.0
    steady: float = 10.0
    """A watch that was open for so long makes the pause short again; not of client-go. One that ends within this time
    counts as a fault, because a proxy may answer in place of the API server."""


class Connection(Protocol):
    """The requests of :class:`dp_extproc.fleet.discovery.kubernetes.client.ApiClient`."""

    async def page(self, parameters: dict[str, str]) -> Page: ...

    def events(self, parameters: dict[str, str]) -> AsyncGenerator[list[Event]]: ...


class Readable(Protocol):
    """What is kept of one object. Equal values stand for no change."""

    @property
    def size(self) -> int:
        """Objects and members that were read."""


_T = TypeVar("_T", bound=Readable)
_T_contra = TypeVar("_T_contra", contravariant=True)


class Reports(Protocol[_T_contra]):
    """Gets the reports of a reflector."""

    def objects(self, parts: Collection[_T_contra]) -> None:
        """Take what is kept of all present objects."""

    def failed(self, message: str) -> None:
        """Take the reason why the objects are unknown at present."""


class Reflector(Generic[_T]):
    """Reports all objects whenever one changes, and after each failure."""

    def __init__(
        self,
        read: Callable[[msgspec.Raw], _T],
        reports: Reports[_T],
        *,
        clock: Callable[[], float],
        rng: random.Random,
        timing: Timing,
    ) -> None:
        """Set up.

        Args:
            read: Translates one object.
            reports: Gets the reports.
            clock: Counts monotonic seconds.
            rng: Moves times at random.
            timing: How long to wait.
        """
        self._read = read
        self._reports = reports
        self._clock = clock
        self._rng = rng
        self._timing = timing
        self._parts: dict[str, _T] = {}
        """What is kept of each object, by its name."""
        self._version = ""
        """Version to watch from; empty before the first list, and when it has expired."""
        self._listed = False
        """Whether there was a list, so that the next one must not be older."""
        self._is_unreported = False
        """Whether a list was read, or an object has changed, since the last report."""
        self._is_failing = False
        self._faults = 0
        """Number of faults since the last steady watch."""
        self._has_expired = False
        """Whether a version has expired since then."""

    async def run(self, connect: Callable[[], AbstractAsyncContextManager[Connection]]) -> None:
        """Report until cancelled. Each failure leads to a new connection."""
        while True:
            try:
                async with connect() as connection:
                    while True:
                        if not self._version:
                            await self._list(connection)
                        await self._watch(connection)
            except ApiError as fault:
                if fault.expired:
                    self._version = ""
                if fault.expired and not self._has_expired:
                    self._has_expired = True  # the API server answers, so the list need not wait
                else:
                    await self._pause(str(fault), fault.retry_after, quiet=fault.quiet)
            except AccessError as error:
                await self._pause(str(error))

    async def _list(self, connection: Connection) -> None:
        parts: dict[str, _T] = {}
        first = {"resourceVersion": ""} if self._listed else {"resourceVersion": "0", "limit": f"{_PAGE_OBJECTS}"}
        page = await connection.page(first)
        read = 0
        while True:
            for text in page.items or ():
                part = parts[self._meta(text).name] = self._part(text)
                read += part.size
                if read >= _TURN:
                    read = 0
                    await asyncio.sleep(0)
            if not page.metadata.more:
                break
            page = await connection.page({"limit": f"{_PAGE_OBJECTS}", "continue": page.metadata.more})
        self._parts, self._version, self._listed = parts, page.metadata.resource_version, True
        self._is_unreported = True

    async def _watch(self, connection: Connection) -> None:
        opened: float | None = None
        recovery: asyncio.TimerHandle | None = None
        parameters = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": f"{self._rng.uniform(*self._timing.watch):.0f}",
            "resourceVersion": self._version,
        }
        try:
            async with aclosing(connection.events(parameters)) as batches:
                async for events in batches:
                    if opened is None:
                        opened = self._clock()
                        if self._is_failing:
                            recovery = asyncio.get_running_loop().call_later(self._timing.steady, self._report)
                    for event in events:
                        self._is_unreported |= self._apply(event)
                    if self._is_unreported:
                        self._report()
        finally:
            if recovery is not None:
                recovery.cancel()
            steady = opened is not None and self._clock() - opened >= self._timing.steady
            if steady:
                self._faults, self._has_expired = 0, False
        if not steady:
            raise ApiError("the watch ended at once; check what answers in place of the API server", quiet=True)

    def _apply(self, event: Event) -> bool:
        """Apply one event. Return whether what is kept of its object has changed."""
        meta = self._meta(event.object)
        before = self._parts.get(meta.name)
        if event.type == "DELETED":
            self._parts.pop(meta.name, None)
        elif event.type in {"ADDED", "MODIFIED"}:
            self._parts[meta.name] = self._part(event.object)
        self._version = meta.resource_version or self._version
        return before != self._parts.get(meta.name)

    def _meta(self, text: msgspec.Raw) -> Meta:
        try:
            return _OBJECT.decode(text).metadata
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ApiError(f"the API server sent an object of an unexpected form ({error})") from None

    def _part(self, text: msgspec.Raw) -> _T:
        try:
            return self._read(text)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ApiError(f"the API server sent an object of an unexpected form ({error})") from None

    def _report(self) -> None:
        self._is_failing = self._is_unreported = False
        self._reports.objects(self._parts.values())

    async def _pause(self, message: str, at_least: float = 0.0, *, quiet: bool = False) -> None:
        if self._is_unreported:
            self._report()
        if self._faults or not quiet:
            self._is_failing = True
            self._reports.failed(message)
        bound = min(self._timing.first_pause * 2.0 ** min(self._faults, 16), self._timing.longest_pause)
        self._faults += 1
        await asyncio.sleep(max(at_least, self._rng.uniform(0.0, bound)))
