"""Record every inference request and its result, for tests. Bounded."""

import base64
import hashlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dp_extproc.lab.engine.connection import connection_of
from dp_extproc.lab.engine.leg import Failure
from dp_extproc.lab.engine.ticket import Ticket

MAX_RECORDS: Final = 10_000
MAX_KEPT_BYTES: Final = 256 << 20
"""Bytes of bodies that are kept; the oldest are dropped first."""
MAX_INLINE_BYTES: Final = 64 << 10
"""Bytes of a body on the page; longer ones have digest and ends there, and a page of their own."""
_END_BYTES: Final = 256


@dataclass(slots=True, eq=False)
class Record:
    """The record of one request."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None
    body_length: int
    body_sha256: str
    received_at: float = field(default_factory=time.time)
    refused: tuple[int, str] | None = None
    """Status and text of a refusal before a scheduler had it."""
    tickets: list[Ticket] = field(default_factory=list)
    fault: str | None = None
    """The fault that it was hit by."""
    answer_status: int | None = None
    answered_at: float | None = None
    """Moment of its last byte."""
    is_over: bool = False
    """Whether nothing more will be answered."""
    disconnected_at: float | None = None
    """Moment at which the client closed the connection before the end of the answer."""

    def refuse(self, status: int, text: str) -> None:
        """Record a refusal."""
        self.refused = (status, text)

    def show(self) -> dict[str, Any]:
        """Describe it as JSON."""
        ends = [ticket.end for ticket in self.tickets]
        failure = next((end for end in ends if isinstance(end, Failure)), None)
        first = [ticket.first_token_at for ticket in self.tickets if ticket.first_token_at is not None]
        ended = [ticket.ended_at for ticket in self.tickets if ticket.ended_at is not None]
        status, text = self.refused or (failure and (failure.status, failure.message)) or (None, None)
        return {
            "number": self.number,
            "method": self.method,
            "path": self.path,
            "headers": self.headers,
            **self._show_body(),
            "rank": self.tickets[0].work.dp_rank if self.tickets else None,
            "outcome": self._outcome(ends, failure),
            "status": status,
            "error": text,
            "received_at": self.received_at,
            "first_token_at": min(first, default=None),
            "ended_at": max(ended, default=None) if None not in ends else None,
            "fault": self.fault,
            "answer_status": self.answer_status,
            "answered_at": self.answered_at,
            "disconnected_at": self.disconnected_at,
            "legs": [_show_leg(ticket) for ticket in self.tickets],
        }

    def _outcome(self, ends: list[Any], failure: Failure | None) -> str:
        if self.refused is not None:
            return "failed"
        if not ends and self.is_over:  # no scheduler has had it
            return "failed" if self.disconnected_at is None else "aborted"
        if not ends or None in ends:
            return "running"
        if failure is None:
            return "finished"
        return "aborted" if failure.status is None else "failed"

    def _show_body(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"body": None, "body_length": self.body_length, "body_sha256": self.body_sha256}
        if self.body is None:
            return shown
        if self.body_length > MAX_INLINE_BYTES:
            shown["body_head"] = self.body[:_END_BYTES].decode("utf-8", "replace")
            shown["body_tail"] = self.body[-_END_BYTES:].decode("utf-8", "replace")
            return shown
        try:
            shown["body"] = self.body.decode()
        except UnicodeDecodeError:
            shown["body_base64"] = base64.b64encode(self.body).decode()
        return shown


class Noted:
    """Send an answer, and record how it reached the client."""

    def __init__(self, answer: ASGIApp, record: Record) -> None:
        """Prepare."""
        self._answer = answer
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        connection = connection_of(scope)

        def lost() -> None:
            self._record.disconnected_at = time.time()

        async def note(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                self._record.answer_status = message["status"]
            elif not message.get("more_body") and self._record.disconnected_at is None:
                self._record.answered_at = time.time()
                connection.on_lost = None

        connection.on_lost = lost
        try:
            await self._answer(scope, receive, note)
        finally:
            self._record.is_over = True


class Journal:
    """Hold the last requests."""

    def __init__(self) -> None:
        """Start empty."""
        self._records: deque[Record] = deque()
        self._kept = 0
        self._count = 0

    def open(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Record:
        """Record a request."""
        self._count += 1
        record = Record(self._count, method, path, headers, body, len(body), hashlib.sha256(body).hexdigest())
        self._records.append(record)
        self._kept += len(body)
        while len(self._records) > MAX_RECORDS:
            self._kept -= len(self._records.popleft().body or b"")
        for old in self._records:
            if self._kept <= MAX_KEPT_BYTES:
                break
            self._kept -= len(old.body or b"")
            old.body = None
        return record

    def find(self, number: int) -> Record | None:
        """Return a request."""
        return next((record for record in self._records if record.number == number), None)

    def clear(self) -> None:
        """Drop all records; requests under way go on without one."""
        self._records.clear()
        self._kept = 0

    @property
    def is_busy(self) -> bool:
        """Whether a request is not answered in full yet."""
        return any(not record.is_over for record in self._records)

    @property
    def count(self) -> int:
        """Return the number of the last request that has arrived, whether or not it is still here."""
        return self._count

    def show(self, after: int = 0) -> list[dict[str, Any]]:
        """Describe the requests with higher numbers than *after*, oldest first."""
        return [record.show() for record in self._records if record.number > after]


def _show_leg(ticket: Ticket) -> dict[str, Any]:
    leg = ticket.leg
    return {
        "rid": leg.rid,
        "dp_rank": ticket.work.dp_rank,
        "stage": str(ticket.work.stage),
        "prompt_tokens": leg.prompt_tokens,
        "output_tokens": len(ticket.tokens),
        "bootstrap_host": leg.bootstrap_host,
        "bootstrap_port": leg.bootstrap_port,
        "bootstrap_room": leg.bootstrap_room,
        "routed_dp_rank": leg.routed_dp_rank,
        "disagg_prefill_dp_rank": leg.disagg_prefill_dp_rank,
    }
