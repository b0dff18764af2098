"""Computes the present endpoints from what all sources report. Pure: the time is handed in, in monotonic seconds.

The rules, per role of a pool:

1. Its endpoints are the members that are READY. One that is TERMINATING leaves at once, and so does one that is
   NOT_READY or missing from the last snapshot, if rule 2 does not keep it.
2. While none of its READY members takes requests, the last endpoints stay, except those that are TERMINATING. They stay
   for ``keep_for`` of their source at most. A READY member takes requests while its engine is ready and not stale.
3. While a source of the role fails, rule 2 has no limit, and the last members of the source count as its present ones.
4. The members of a source that is no longer configured stay until each new source of the role has reported or failed.
   A list in the configuration itself is an exception: what it lists no longer leaves at once.
5. A URL is one endpoint. The first source in the order of the configuration that lists it counts.
6. Another uid at the same URL is another engine: one endpoint leaves, and another one joins. No uid is no other one.
7. Reports are applied at most every 100 ms; another configuration is applied at once.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from dp_extproc.config.discovery import MemberState
from dp_extproc.config.pools import EngineKind
from dp_extproc.engines.model import Endpoint, Role, SourceKind, is_same_uid
from dp_extproc.fleet.discovery.source import Member, Source

DEBOUNCE_SECONDS: Final = 0.1
"""Least time between two computations. Members change tens of times a second in a rollout, and engines are read more
often."""
_BEST_FIRST: Final = (MemberState.READY, MemberState.NOT_READY, MemberState.TERMINATING)
"""Of two members of one source with the same URL, such as an old and a new pod at one IP address, the better counts."""


class DrainReason(StrEnum):
    """Why an endpoint is none any more, for the log."""

    TERMINATING = "it terminates"
    MISSING = "it is no longer listed"
    NOT_READY = "it is not ready"
    NOT_KEPT = "no other member of its role took requests within keep_for"
    REPLACED = "another engine has its address"
    UNCONFIGURED = "its source is no longer configured"
    LISTED_ELSEWHERE = "another source lists it now"


@dataclass(frozen=True, slots=True)
class Place:
    """What the configuration has about every member of a role of a pool."""

    pool: str
    role: Role
    engine: EngineKind = EngineKind.AUTO
    needs_overrides: bool = False
    headers_only: bool = False
    has_tls: bool = False
    """Whether engines are reached by TLS (``engine_tls``), and so by ``https://``."""


@dataclass(frozen=True, slots=True)
class RoleSource:
    """A source of one role of one pool, as it is configured."""

    key: Hashable
    """Stays the same in another configuration if the source does."""
    place: Place
    kind: SourceKind
    name: str
    """Name for logs and messages, such as ``dns decode.llm.svc``."""
    keep_for: float = 30.0
    source: Source | None = None
    """What reports the members; None if they are in the configuration itself."""
    members: tuple[Member, ...] = ()
    """The members in the configuration itself."""


@dataclass(slots=True)
class Report:
    """What a source has reported last."""

    members: tuple[Member, ...] | None = None
    """None before the first snapshot."""
    failure: str | None = None
    """Why the members are unknown at present; None if they are known."""
    failures: int = 0
    """Failures so far."""
    failing_since: float | None = None
    """When the present failure began."""

    def age(self, now: float) -> float:
        """Return for how many seconds the source has failed; 0 while it reports."""
        return 0.0 if self.failing_since is None else now - self.failing_since

    @property
    def is_pending(self) -> bool:
        """Whether the source has neither reported nor failed yet."""
        return self.members is None and self.failure is None


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the set of endpoints."""

    endpoints: tuple[Endpoint, ...]
    """All present endpoints, in the order of the configuration."""
    joined: tuple[Endpoint, ...] = ()
    left: tuple[tuple[Endpoint, DrainReason], ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    source: RoleSource
    member: Member

    @property
    def endpoint(self) -> Endpoint:
        member, place = self.member, self.source.place
        return Endpoint(
            url=member.url,
            host=member.host,
            port=member.port,
            pool=place.pool,
            role=place.role,
            dp_size=member.dp_size,
            dp_rank=member.dp_rank,
            bootstrap_host=member.bootstrap_host,
            bootstrap_port=member.bootstrap_port,
            engine=place.engine,
            needs_overrides=place.needs_overrides,
            headers_only=place.headers_only,
            source=self.source.kind,
            uid=member.uid,
            name=member.name,
            group=member.group,
        )

    def is_same(self, other: "_Entry") -> bool:
        """Return whether two entries with one URL are of the same engine in the same role."""
        return self.source.place.role is other.source.place.role and is_same_uid(self.member.uid, other.member.uid)


@dataclass(slots=True)
class _RoleState:
    """The sources of a role in order, and its present endpoints by URL."""

    sources: list[RoleSource] = field(default_factory=list)
    present: dict[str, _Entry] = field(default_factory=dict)
    keeps_some: bool = False
    """Whether some endpoints stay only until a READY member takes requests."""
    unready_since: float | None = None
    """Since when no READY member has taken requests while every source reports; None if this is not so."""


class Roster:
    """The present endpoints, by the rules of this module."""

    def __init__(self, takes_requests: Callable[[Endpoint], bool]) -> None:
        """Begin without sources. *takes_requests* returns whether an engine is ready and not stale."""
        self._takes_requests = takes_requests
        self.endpoints: tuple[Endpoint, ...] = ()
        self.sources: Mapping[Hashable, RoleSource] = {}
        """The configured sources by key, in the order of the configuration."""
        self.reports: dict[Hashable, Report] = {}
        """What each source has reported, by key."""
        self.duplicates: frozenset[tuple[str, str, str]] = frozenset()
        """URLs that several sources list, each with the name of the source that counts and of one that does not."""
        self._roles: dict[tuple[str, Role], _RoleState] = {}
        self._entries: dict[str, _Entry] = {}
        """The present endpoints by URL."""
        self._is_dirty = False
        self._applied_at = -math.inf
        self._expires = math.inf
        """When the next ``keep_for`` ends."""

    @property
    def is_complete(self) -> bool:
        """Whether each source has reported or failed, and all of it is applied."""
        return not self._is_dirty and not any(report.is_pending for report in self.reports.values())

    @property
    def due(self) -> float:
        """When :meth:`advance` has something to do next."""
        return self._applied_at + DEBOUNCE_SECONDS if self._is_dirty else self._expires

    @property
    def not_ready(self) -> Counter[tuple[str, Role, SourceKind]]:
        """Count the members that are no endpoints because they are not ready, by pool, role and kind of the source."""
        present = {endpoint.url for endpoint in self.endpoints}
        return Counter(
            (source.place.pool, source.place.role, source.kind)
            for key, source in self.sources.items()
            for member in self.reports[key].members or ()
            if member.state is MemberState.NOT_READY and member.url not in present
        )

    def reconsider(self) -> bool:
        """Consider that an engine may take requests from now on. Returns whether that can change an endpoint."""
        if keeps_some := any(role.keeps_some for role in self._roles.values()):
            self._is_dirty = True
        return keeps_some

    def configure(self, sources: Iterable[RoleSource], now: float) -> Change:
        """Change to other sources, at once. A source that keeps its key keeps its members."""
        self.sources = {source.key: source for source in sources}
        self.reports = {key: self.reports.get(key, Report()) for key in self.sources}
        roles: dict[tuple[str, Role], _RoleState] = {}
        for key, source in self.sources.items():
            if source.source is None:
                self.reports[key].members = source.members
            roles.setdefault((source.place.pool, source.place.role), _RoleState()).sources.append(source)
        for place, before in self._roles.items():
            for url, entry in before.present.items():
                kept = self.sources.get(entry.source.key)
                to = place if kept is None else (kept.place.pool, kept.place.role)
                if to in roles:
                    source = kept or replace(entry.source, place=roles[to].sources[0].place)
                    roles[to].present[url] = replace(entry, source=source)
                    roles[to].unready_since = before.unready_since
        self._roles = roles
        return self._apply(now)

    def snapshot(self, key: Hashable, members: tuple[Member, ...]) -> None:
        """Take all present members of a source."""
        if (report := self.reports.get(key)) is not None:  # it may be configured no longer
            self._is_dirty |= report.members != members or report.failure is not None
            report.members, report.failure, report.failing_since = members, None, None

    def failed(self, key: Hashable, message: str, now: float) -> None:
        """Take the reason why the members of a source are unknown."""
        if (report := self.reports.get(key)) is not None:
            self._is_dirty |= report.failure is None
            report.failing_since = now if report.failure is None else report.failing_since
            report.failure = message
            report.failures += 1

    def advance(self, now: float) -> Change | None:
        """Apply what is due; None if no endpoint has changed."""
        if now < self.due:
            return None
        before, self._applied_at = self.endpoints, now
        change = self._apply(now)
        return None if change.endpoints == before else change

    def _apply(self, now: float) -> Change:
        listed = self._listed()
        self._expires = math.inf
        expired = {url for role in self._roles.values() for url in self._update(role, listed, now)}
        before, self._entries = (
            self._entries,
            {entry.member.url: entry for role in self._roles.values() for entry in _in_order(role)},
        )
        self.endpoints = tuple(entry.endpoint for entry in self._entries.values())
        self._is_dirty = False
        return Change(
            self.endpoints,
            joined=tuple(entry.endpoint for entry in _missing(self._entries, before)),
            left=tuple(
                (entry.endpoint, self._reason(entry, listed, expired)) for entry in _missing(before, self._entries)
            ),
        )

    def _listed(self) -> dict[str, _Entry]:
        """Find the member that counts for each URL, and note the duplicates."""
        listed: dict[str, _Entry] = {}
        duplicates: set[tuple[str, str, str]] = set()
        for key, source in self.sources.items():
            for member in sorted(self.reports[key].members or (), key=lambda each: _BEST_FIRST.index(each.state)):
                first = listed.setdefault(member.url, _Entry(source, member))
                if first.source is not source:
                    duplicates.add((member.url, first.source.name, source.name))
        self.duplicates = frozenset(duplicates)
        return listed

    def _update(self, role: _RoleState, listed: Mapping[str, _Entry], now: float) -> Collection[str]:
        """Compute the present endpoints of a role. Returns the URLs of those whose ``keep_for`` has just ended."""
        keys = {source.key for source in role.sources}
        ready = {
            url: entry
            for url, entry in listed.items()
            if entry.source.key in keys and entry.member.state is MemberState.READY
        }
        reports = [self.reports[key] for key in keys]
        is_pending = any(report.is_pending for report in reports)
        some_take = any(self._takes_requests(entry.endpoint) for entry in ready.values())
        others = {url: entry for url, entry in role.present.items() if url not in ready}
        kept = {url: found for url, entry in others.items() if (found := self._kept(entry, keys, listed)) is not None}
        if some_take:  # rule 4 alone keeps endpoints now
            kept = {url: each for url, each in kept.items() if is_pending and each.source.key not in self.sources}
        role.present, role.keeps_some = ready | kept, bool(kept) and not some_take
        if some_take or not kept or is_pending or any(report.failure is not None for report in reports):
            role.unready_since = None
            return ()
        role.unready_since = now if role.unready_since is None else role.unready_since
        ends = {url: role.unready_since + entry.source.keep_for for url, entry in kept.items()}
        expired = {url for url, end in ends.items() if end <= now}
        for url in expired:
            del role.present[url]
        self._expires = min([self._expires, *(end for end in ends.values() if end > now)])
        return expired

    def _kept(self, entry: _Entry, keys: Collection[Hashable], listed: Mapping[str, _Entry]) -> _Entry | None:
        """Return an endpoint that rule 2 keeps, as it is listed now; None if it is not kept."""
        now = listed.get(entry.member.url)
        if now is None:
            is_listed_here = entry.source.kind is SourceKind.STATIC and entry.source.key in keys
            return None if is_listed_here else entry
        is_same = now.source.key in keys and is_same_uid(now.member.uid, entry.member.uid)
        return now if is_same and now.member.state is MemberState.NOT_READY else None

    def _reason(self, entry: _Entry, listed: Mapping[str, _Entry], expired: set[str]) -> DrainReason:
        url, now = entry.member.url, listed.get(entry.member.url)
        if url in expired:
            return DrainReason.NOT_KEPT
        if now is None:
            return DrainReason.MISSING if entry.source.key in self.sources else DrainReason.UNCONFIGURED
        if not is_same_uid(now.member.uid, entry.member.uid):
            return DrainReason.REPLACED
        if now.source.key != entry.source.key:
            return DrainReason.LISTED_ELSEWHERE
        return DrainReason.TERMINATING if now.member.state is MemberState.TERMINATING else DrainReason.NOT_READY


def _missing(some: Mapping[str, _Entry], others: Mapping[str, _Entry]) -> Iterator[_Entry]:
    """Find the entries whose engine has no entry in its role among others."""
    for url, entry in some.items():
        other = others.get(url)
        if other is None or not entry.is_same(other):
            yield entry


def _in_order(role: _RoleState) -> list[_Entry]:
    """Sort the endpoints of a role by source. Those of a list keep its order, others are sorted by name and URL."""
    positions: dict[tuple[Hashable, str], int] = {}
    for source in role.sources:
        positions |= {(source.key, each.url): index for index, each in enumerate(source.members or ())}
    sources = {source.key: index for index, source in enumerate(role.sources)}

    def order(entry: _Entry) -> tuple[int, int, str, str]:
        key, member = entry.source.key, entry.member
        return sources.get(key, len(sources)), positions.get((key, member.url), 0), member.name, member.url

    return sorted(role.present.values(), key=order)
