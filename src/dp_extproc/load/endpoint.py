"""One endpoint: its ranks, in groups that step together, and how well it is known."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

from msgspec import Struct

from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.engines.capabilities import Capabilities
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, RankSample, Role
from dp_extproc.estimators.decode_pace import compare
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.health import Health
from dp_extproc.load.prefill import PrefillGroup
from dp_extproc.load.step_group import SOMEBODY, RankLoad, Reservation, StepGroup, absorb

_T = TypeVar("_T")


class Freshness(IntEnum):
    """How far an endpoint's load can be trusted; lower is better."""

    FRESH = 0
    STALE = 1
    """Neither sample nor answer for a while, or the engine refuses connections. Used when no endpoint of its role is
    fresh."""
    UNKNOWN = 2
    """No sample ever, but the engine has told its ranks. Used when no endpoint of its role has ever had one."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What a step costs besides its tokens, in tokens that would cost as much."""

    prefill_step: float = 500.0
    """The fixed time of a prefill step: 10 ms, at 20 us per token. A wrong value costs little."""
    decode_request: float = 1000.0
    """The fixed time per sequence in a decode step: 50 us, at 50 ns per token of context."""


DEFAULT_COSTS: Final = StepCosts()
DEFAULT_HEALTH: Final = OutlierDetectionSettings()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Those ranks of a group that a request may go to."""

    group: StepGroup
    positions: Sequence[int] | None
    """In the lists of the group; None stands for all."""

    def of(self, values: Sequence[_T]) -> Sequence[_T]:
        """Give what belongs to these ranks out of a list of the group."""
        return values if self.positions is None else [values[position] for position in self.positions]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """An endpoint, and those of its ranks that a request may go to."""

    endpoint: "EndpointLoad"
    parts: tuple[Part, ...]
    """At least one, each with at least one rank."""

    @property
    def ranks(self) -> list[RankLoad]:
        return [rank for part in self.parts for rank in part.of(part.group.ranks)]

    def only(self, wanted: Callable[[RankLoad], bool]) -> "Candidate | None":
        """Give what is left with the wanted ranks alone; None if that is nothing."""
        left = _candidate(self.endpoint, [rank for rank in self.ranks if wanted(rank)])
        return left if left.parts else None


class EndpointLoad:
    """One endpoint: its ranks and how well it is known."""

    __slots__ = (
        "_counts",
        "_demoted",
        "address",
        "answered_at",
        "cached_prompt_tokens",
        "candidate",
        "capabilities",
        "configured",
        "facts",
        "groups",
        "has_external_requests",
        "health",
        "is_away",
        "ranks",
        "sampled",
    )  # fmt: skip

    def __init__(
        self,
        endpoint: Endpoint,
        address: str,
        facts: EngineFacts,
        capabilities: Capabilities,
        costs: StepCosts,
        *,
        health: Health | None = None,
    ) -> None:
        self.configured = endpoint
        """Its URL, role, pool and bootstrap address."""
        self.health = health or Health(DEFAULT_HEALTH)
        self.address = address
        """``IP:port``, what Envoy dials."""
        self.facts = facts
        self.capabilities = capabilities
        self.groups = tuple(_groups(endpoint.role, facts, costs))
        self.ranks = tuple(rank for group in self.groups for rank in group.ranks)
        usable = capabilities.prefill_ranks(facts.dp_ranks) if endpoint.role is Role.PREFILL else range(facts.dp_ranks)
        self.candidate = _candidate(self, [self.ranks[index] for index in usable])
        """The host with every rank that can serve."""
        self.cached_prompt_tokens = 0.0
        """Prompt tokens of all requests sent here that its ranks were taken to hold already."""
        self.sampled = -math.inf
        """When the last good load page was asked for."""
        self.answered_at = -math.inf
        """When it had computed a prompt of ours the last time, or began to answer."""
        self.has_external_requests = False
        """Whether the last page showed requests that neither we nor our peers have sent."""
        self.is_away = False
        """Whether it could not be reached since it was read the last time."""
        self._demoted = False
        self._counts: tuple[int, ...] = (0, 0)

    @property
    def url(self) -> str:
        return self.configured.url

    @property
    def pool(self) -> str:
        return self.configured.pool

    @property
    def role(self) -> Role:
        return self.configured.role

    @property
    def tokens(self) -> float:
        """The load of all ranks."""
        return sum(sum(group.loads) for group in self.groups)

    @property
    def requests(self) -> float:
        """Requests in flight, those of others included."""
        return sum(group.requests + group.external_requests for group in self.groups)

    @property
    def reserved_requests(self) -> float:
        """Likewise, but those that are on our books alone."""
        return sum(group.requests for group in self.groups)

    @property
    def reservations(self) -> int:
        """Entries on the books of all ranks; a request whose rank the engine picks has one on each."""
        return sum(len(rank.open) for rank in self.ranks)

    @property
    def expired(self) -> int:
        """Requests that no event has ended."""
        return sum(group.expired for group in self.groups)

    @property
    def tpot(self) -> float | None:
        """How long a token takes here, if this is known."""
        told = [group.pace.told for group in self.groups if isinstance(group, DecodeGroup)]
        known = [tpot for tpot in told if tpot is not None]
        return sum(known) / len(known) if known else None

    def freshness(self, now: float, stale_after: float) -> Freshness:
        if self.sampled == -math.inf:
            return Freshness.UNKNOWN
        return Freshness.STALE if self._demoted or now - self.seen_at > stale_after else Freshness.FRESH

    @property
    def seen_at(self) -> float:
        """When it was read, or has answered a request: who answers requests needs no page to be known well."""
        return max(self.sampled, self.answered_at)

    def absorb(self, samples: tuple[RankSample, ...], started: float, now: float) -> None:
        """Take in a load page that was asked for at *started*. Ranks that the server does not have are left out."""
        before, self.sampled = self.sampled, started
        self._demoted = False
        known = [(self.ranks[sample.dp_rank], sample) for sample in samples if 0 <= sample.dp_rank < len(self.ranks)]
        self.has_external_requests = False
        if known:
            readings = [(rank, sample, _moment_of(sample, started, rank, before)) for rank, sample in known]
            ours = sum(rank.kept_requests for rank in self.ranks)
            absorb(readings, len(self.ranks), now)
            if any(sample.age is None for _, sample in known):  # of no known moment: ours are all that it may have seen
                beyond = sum(sample.running_requests + sample.waiting_requests for _, sample in known) - ours
            else:
                beyond = sum(rank.external_requests for rank in self.ranks)
            self.has_external_requests = beyond >= SOMEBODY

    def has_restarted(self, page: LoadPage) -> bool:
        """Tell whether the engine's running counts have begun anew since the page before."""
        before, told = self._counts, (page.prompt_tokens, page.uncached_prompt_tokens)
        self._counts = tuple(then if now is None else now for now, then in zip(told, before, strict=True))
        return any(now < then for now, then in zip(self._counts, before, strict=True))

    def demote(self) -> None:
        """Trust the samples no longer, however young: the engine is known to be away."""
        self._demoted = True

    def forget_external(self, now: float) -> None:
        """Take nothing for the load of others until the next page: that of the last one is long over."""
        for group in self.groups:
            group.forget_external(now)

    def reserve(
        self, rank: int | None, tokens: float, now: float, requests: float = 1.0, cached: float = 0.0
    ) -> tuple[Reservation, ...]:
        """Put a request on the books; see :meth:`RankLoad.reserve`.

        When the engine itself picks the rank (None), each rank carries an even share.
        """
        self.cached_prompt_tokens += cached
        if rank is not None:
            return (self.ranks[rank].reserve(tokens, now, requests, cached),)
        share = 1.0 / len(self.ranks)
        return tuple(
            each.reserve(tokens * share, now, requests * share, cached * share, is_share=len(self.ranks) > 1)
            for each in self.ranks
        )


class Target(Struct, frozen=True):
    """The endpoint and the rank that were picked for one leg of a request."""

    endpoint: EndpointLoad
    rank: int | None
    """The rank that will serve; None if the engine picks it, and so no router can predict it."""
    routed: bool
    """Whether the body names the rank. If not, the room leads to it, or the engine picks."""
    by_room: bool
    """Whether the bootstrap room must lead to the rank."""
    cached: float = 0.0
    """Tokens of the prompt that are expected in the rank's prefix cache."""

    @property
    def residue(self) -> tuple[int, int] | None:
        """Return ``(rank, ranks)`` for the bootstrap room; None if it need not lead to the rank."""
        return self.endpoint.facts.place_of(self.rank) if self.by_room and self.rank is not None else None

    @property
    def global_rank(self) -> int | None:
        """Return the rank as an engine of several nodes counts it; None if the engine picks it."""
        return None if self.rank is None else self.endpoint.facts.place_of(self.rank)[0]


def compare_pace(hosts: Iterable[EndpointLoad]) -> None:
    """Find out how slow each of some decode servers is, against their average."""
    groups = [group for host in hosts for group in host.groups if isinstance(group, DecodeGroup)]
    if (found := compare([group.pace for group in groups])) is not None:
        usual, slow = found
        for group, slowness in zip(groups, slow, strict=True):
            group.is_usual(usual, slowness)


def _candidate(host: EndpointLoad, ranks: Sequence[RankLoad]) -> Candidate:
    parts = []
    for group in host.groups:
        positions = [rank.position for rank in ranks if rank.group is group]
        if positions:
            parts.append(Part(group, None if len(positions) == len(group.ranks) else positions))
    return Candidate(host, tuple(parts))


def _groups(role: Role, facts: EngineFacts, costs: StepCosts) -> Sequence[StepGroup]:
    """Group the ranks: with DP attention all step together, replicas each for themselves."""
    size = facts.dp_ranks
    members = [range(size)] if facts.dp_attention else [range(index, index + 1) for index in range(size)]
    if role is Role.PREFILL:
        return [
            PrefillGroup(each, budget=facts.step_tokens, chunked=facts.chunked, step_tokens=costs.prefill_step)
            for each in members
        ]
    computes = role is Role.WORKER
    return [DecodeGroup(each, request_tokens=costs.decode_request, computes=computes) for each in members]


def _moment_of(sample: RankSample, started: float, rank: RankLoad, before: float) -> float:
    """When a sample was taken: by the page's own time stamps if it has them, else by whether it has moved.

    Gauges without a time stamp may be as old as they like while they stay the same; once they have changed they
    are younger than the page before.
    """
    if sample.age is not None:
        return started - sample.age
    return rank.sampled_at if sample == rank.sample else max(rank.sampled_at, before)
