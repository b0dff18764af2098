"""Switch faults at run time, for tests of clients and routers.

Every page has its switch, all inference paths have one together, and so have the bootstrap port and the schedulers.
"""

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from dp_extproc.lab.engine.api.broken import (
    Commented,
    Compressed,
    Cut,
    Flooded,
    Hang,
    Interrupted,
    Long,
    Pause,
    Short,
    noise,
    pause,
)
from dp_extproc.lab.engine.api.errors import failed
from dp_extproc.lab.engine.leg import Failure

PAGES: Final = ("loads", "metrics", "server_info", "model_info", "health", "models")
INFERENCE: Final = "inference"
BOOTSTRAP: Final = "bootstrap"
SCHEDULER: Final = "scheduler"
"""The schedulers of all ranks: a hang begins no step, finishes none and publishes no load, while all pages answer."""
PORTS: Final = (INFERENCE, BOOTSTRAP)
"""Ports that can refuse connections: the API port with everything on it, and the bootstrap port."""

_COMMENT: Final = ": x\n\n"
"""Text of a flood by default: an SSE comment."""
_GARBAGE: Final = b'{"loads": [{"dp_rank": \xff\x00 sglang:num_used_tokens{dp_rank= 1e'


class Kind(StrEnum):
    """Kinds of faults."""

    OK = "ok"
    REFUSE = "refuse"
    """The port is closed, and all its connections are cut."""
    HANG = "hang"
    """No further byte comes."""
    SLOW = "slow"
    """The next byte comes after some seconds."""
    RESET = "reset"
    """The connection is reset."""
    CLOSE = "close"
    """The connection is closed, as by a process that is killed."""
    GARBAGE = "garbage"
    """200, with a body that cannot be parsed."""
    TEXT = "text"
    """200, with the body that the switch has as ``text``: a page with impossible values."""
    NOISE = "noise"
    """Bytes that are not HTTP."""
    SHORT = "short"
    """The body is shorter than its content-length; then the connection is closed."""
    LONG = "long"
    """More bytes come than belong to the answer; then the connection is closed."""
    FLOOD = "flood"
    """Before its first event a stream sends one text again and again, as fast as it is read."""
    COMMENTS = "comments"
    """Before its first event a stream sends a comment every so many seconds, until the fault is switched off."""
    GZIP = "gzip"
    """The answer is compressed, whatever the request accepts."""
    FAIL = "fail"
    """The scheduler gives the request up; the engine answers as it does for the path."""
    BAD_REQUEST = "400"
    INTERNAL = "500"
    UNAVAILABLE = "503"


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The state of one switch."""

    kind: Kind
    after: int = 0
    """Chunks of the answer that come before ``hang``, ``slow``, ``reset`` and ``close``; 0 is before its headers. For
    ``fail``: tokens. ``short`` comes at the end."""
    seconds: float = 0.0
    """Seconds without bytes before the fault; for ``slow`` the whole pause. Also before an error behind half of its
    text, between the head of a stream and the ``flood``, or between two ``comments``. Unscaled."""
    text: str | None = None
    """The whole body for ``text``; the repeated text for ``flood``. By default nothing, and a comment."""
    size: int = 0
    """Bytes of a ``flood`` that come before the stream goes on; 0 for no end."""
    times: int | None = None
    """Requests that it hits before it is switched off; None for all."""


class Faults:
    """The faults that are switched on, by page or port."""

    def __init__(self) -> None:
        """Start without faults."""
        self.active: dict[str, Fault] = {}
        self._released = {target: asyncio.Event() for target in (*PAGES, *PORTS, SCHEDULER)}

    def switch(self, wanted: dict[str, Kind | Fault]) -> None:
        """Switch some faults.

        Raises:
            ValueError: There is no such page, or it has no such fault.
        """
        faults = {target: each if isinstance(each, Fault) else Fault(each) for target, each in wanted.items()}
        for target, fault in faults.items():
            if target not in self._released:
                raise ValueError(f"{target} is not one of {', '.join(self._released)}")
            if fault.kind is Kind.REFUSE and target not in PORTS:
                raise ValueError(f"{target}: only {' and '.join(PORTS)} have ports to close")
            if target == SCHEDULER and fault.kind not in {Kind.HANG, Kind.OK}:
                raise ValueError(f"{target}: schedulers can only hang")
            if fault.kind is Kind.FAIL and target != INFERENCE:
                raise ValueError(f"{target}: only {INFERENCE} has schedulers")
            if fault.kind is Kind.FLOOD and fault.text == "":
                raise ValueError(f"{target}: a flood needs a text")
        for target, fault in faults.items():
            self._set(target, fault)
            self._released[target].set()
            self._released[target] = asyncio.Event()

    def refuses(self, target: str) -> bool:
        """Check whether a port is to be closed."""
        return target in self.active and self.active[target].kind is Kind.REFUSE

    def take(self, target: str) -> Fault | None:
        """Return the fault that hits the next request, if there is one, and count it."""
        fault = self.active.get(target)
        if fault is None or fault.kind is Kind.REFUSE:
            return None
        if fault.times is not None:
            left = fault.times - 1
            self._set(target, msgspec.structs.replace(fault, times=left) if left > 0 else Fault(Kind.OK))
        return fault

    async def answer(self, target: str, request: Request, healthy: Callable[[], Awaitable[Response]]) -> ASGIApp:
        """Answer as *healthy* would, unless a fault is switched on."""
        return await self.spoil(self.take(target), target, request, healthy)

    async def spoil(
        self, fault: Fault | None, target: str, request: Request, healthy: Callable[[], Awaitable[Response]]
    ) -> ASGIApp:
        """Answer with a fault that was taken."""
        if fault is None:
            return await healthy()
        released = self._released[target]
        late: ASGIApp
        match fault.kind:
            case Kind.BAD_REQUEST | Kind.INTERNAL | Kind.UNAVAILABLE:
                error = failed(request.url.path, Failure(int(fault.kind), "a fault is switched on"))
                return Interrupted(error, 1, Pause(released, fault.seconds))
            case Kind.GARBAGE | Kind.TEXT:
                text = _GARBAGE if fault.kind is Kind.GARBAGE else fault.text or ""
                return Response(text, media_type="application/json")
            case Kind.NOISE:
                return noise
            case Kind.SHORT | Kind.LONG | Kind.FLOOD | Kind.COMMENTS | Kind.GZIP:
                return _with_other_bytes(fault, await healthy(), released)
            case Kind.SLOW if not fault.after:
                await pause(request.receive, released, fault.seconds)
                return await healthy()
            case Kind.SLOW:
                late = Pause(released, fault.seconds)
            case Kind.HANG:
                late = Hang(released)
            case Kind.RESET | Kind.CLOSE:
                late = Cut(Pause(released, fault.seconds), reset=fault.kind is Kind.RESET)
            case _:
                return await healthy()
        return Interrupted(await healthy(), fault.after, late) if fault.after else late

    def _set(self, target: str, fault: Fault) -> None:
        if fault.kind is Kind.OK:
            self.active.pop(target, None)
        else:
            self.active[target] = fault


def _with_other_bytes(fault: Fault, healthy: ASGIApp, released: asyncio.Event) -> ASGIApp:
    match fault.kind:
        case Kind.LONG:
            return Long(healthy)
        case Kind.GZIP:
            return Compressed(healthy)
        case Kind.COMMENTS:
            return Commented(healthy, _COMMENT.encode(), released, fault.seconds)
        case Kind.FLOOD:
            return Flooded(healthy, (fault.text or _COMMENT).encode(), fault.size, Pause(released, fault.seconds))
        case _:
            return Short(healthy, Pause(released, fault.seconds))
