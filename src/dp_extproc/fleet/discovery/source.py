"""What a source of endpoints reports: complete snapshots of the members of one role of one pool, or a failure. Pure.

A source reports all members each time, never a change. So no change can be lost, and all rules of joining, draining and
keeping are in one place behind all sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from dp_extproc.config.discovery import MemberState
from dp_extproc.engines.model import SourceKind


@dataclass(frozen=True, slots=True)
class Member:
    """One endpoint as its source reports it. Its fields are those of :class:`dp_extproc.engines.model.Endpoint`."""

    url: str
    host: str
    port: int
    state: MemberState = MemberState.READY
    uid: str = ""
    name: str = ""
    group: str | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    dp_size: int | None = None
    dp_rank: int | None = None


WHEN_EMPTY: Final[Mapping[SourceKind, str]] = {
    SourceKind.DNS: "check the name, and that engines are ready behind it",
    SourceKind.FILE: "write entries into the file",
    SourceKind.KUBERNETES: "check the name or the labels, the namespace, and that there are pods",
}
"""What an operator does about a source without members. A list in the configuration cannot be empty."""


class SourceListener(Protocol):
    """Gets the reports of one source. Calls are made in the event loop, so each must be short."""

    def snapshot(self, members: tuple[Member, ...]) -> None:
        """Take all present members. A source may repeat itself."""

    def failed(self, message: str) -> None:
        """Take the reason why the members are unknown at present. It is repeated at each try."""


class Source(Protocol):
    """A source of the endpoints of one role of one pool."""

    @property
    def kind(self) -> SourceKind: ...

    @property
    def keep_for(self) -> float:
        """Seconds for which the last members are kept while no member is ready, except those that terminate."""

    def __str__(self) -> str:
        """Name the source for logs and messages, such as ``dns decode.llm.svc``."""

    async def run(self, listener: SourceListener) -> None:
        """Report until cancelled. No fault of the outside world raises an exception."""
