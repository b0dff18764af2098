"""One endpoint: its ranks, in step groups, how fresh their samples are, and what of it a request may use."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import fmean
from typing import Final, TypeVar

from msgspec import Struct

from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.engines.capabilities import Capabilities
from dp_extproc.engines.compatibility import PairingKey, pairing_key
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, PrefillSteps, RankSample, Role
from dp_extproc.estimators.prefill_speed import PrefillSpeed
from dp_extproc.estimators.prefix_truth import PrefixTruth
from dp_extproc.estimators.prompt_rate import PromptRate
from dp_extproc.load.attribution import Reading, absorb
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.health import Health
from dp_extproc.load.prefill import PrefillGroup
from dp_extproc.load.records import Work
from dp_extproc.load.standstill import StandstillDetector
from dp_extproc.load.step_group import EXTERNAL_FROM, RankLoad, Reservation, StepGroup

INACTIVE_SECONDS: Final = 30.0
"""Seconds for which a rank is left out that an engine has refused as not active. A joining rank loads its weights."""

_T = TypeVar("_T")


class Freshness(IntEnum):
    """How recent the load of an endpoint is; lower is better."""

    FRESH = 0
    SUSPECT = 1
    """The load page of the endpoint answers, but its scheduler stands still (:mod:`dp_extproc.load.standstill`)."""
    STALE = 2
    """The endpoint had neither sample nor response for a while, or refuses connections."""
    UNKNOWN = 3
    """The endpoint never had a sample, but its engine has reported its ranks."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What a step costs besides its tokens, in tokens that take as long."""

    prefill_step: float = 500.0
    """The fixed time of a prefill step: 10 ms, at 20 us per token. A wrong value has little effect."""
    decode_request: float = 1000.0
    """The fixed time per sequence in a decode step: 50 us, at 50 ns per token of context."""


DEFAULT_COSTS: Final = StepCosts()
DEFAULT_HEALTH: Final = OutlierDetectionSettings()


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The ranks of a step group that a request may go to."""

    group: StepGroup
    positions: Sequence[int] | None
    """Positions in the lists of the group; None for all."""

    def of(self, values: Sequence[_T]) -> Sequence[_T]:
        """Return the values of these ranks from a list of the group."""
        return values if self.positions is None else [values[position] for position in self.positions]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """An endpoint, and the ranks of it that a request may go to."""

    endpoint: "EndpointLoad"
    parts: tuple[Part, ...]
    """At least one, each with at least one rank."""

    @property
    def ranks(self) -> list[RankLoad]:
        return [rank for part in self.parts for rank in part.of(part.group.ranks)]

    def only(self, wanted: Callable[[RankLoad], bool]) -> "Candidate | None":
        """Return the candidate with the wanted ranks alone; None if it has none."""
        left = _candidate(self.endpoint, [rank for rank in self.ranks if wanted(rank)])
        return left if left.parts else None


class EndpointLoad:
    """One endpoint, with its ranks and what its engine reports."""

    __slots__ = (
        "_counts", "_left_out", "_prompt_rate", "_standstill", "_usable", "address", "answered_at",
        "cached_prompt_tokens", "candidate", "capabilities", "configured", "facts", "groups", "has_external_requests",
        "health", "is_away", "is_gone", "is_ready", "prefill_speeds", "prefix_truth", "ranks", "sampled_at",
    )  # fmt: skip

    def __init__(
        self,
        endpoint: Endpoint,
        address: str,
        facts: EngineFacts,
        capabilities: Capabilities,
        costs: StepCosts,
        *,
        health: Health,
    ) -> None:
        self.configured = endpoint
        """The endpoint as configured: URL, role, pool and bootstrap address."""
        self.health = health
        self.address = address
        """``IP:port``, to which Envoy connects."""
        self.facts = facts
        self.capabilities = capabilities
        self.groups = tuple(_groups(endpoint.role, facts, costs))
        self.ranks = tuple(rank for group in self.groups for rank in group.ranks)
        usable = capabilities.prefill_ranks(facts.dp_ranks) if endpoint.role is Role.PREFILL else range(facts.dp_ranks)
        self._left_out: dict[int, float] = {}
        """Until when each rank is left out that its engine does not use."""
        self._usable = _candidate(self, [self.ranks[index] for index in usable])
        """The endpoint with every rank that can serve."""
        self.candidate = self._usable
        """The same without suspect ranks, as far as there are others."""
        self.prefill_speeds = tuple(PrefillSpeed() for _ in self.groups)
        """The prefill speed of each group, as the engine counts it."""
        self._standstill = StandstillDetector(
            self.groups, self.prefill_speeds, facts, publishes_stalls=capabilities.publishes_stalls
        )
        self.cached_prompt_tokens = 0.0
        """Prompt tokens of all requests so far that were expected in the prefix cache of their rank."""
        self.prefix_truth = PrefixTruth()
        """How many of the expected cached tokens the engine has found."""
        self.sampled_at = -math.inf
        """When the last good load page was requested."""
        self.answered_at = -math.inf
        """When the endpoint last had computed a prompt of a request, or began its response."""
        self.has_external_requests: bool | None = False
        """Whether the last page has more requests than this replica and its peers have sent. None if these requests may
        be own ones that count as computed."""
        self.is_away = False
        """Whether the endpoint was unreachable after the last good load page."""
        self.is_gone = False
        """Whether no engine listens any more: the samples are stale, however recent they are, until the next one."""
        self.is_ready = True
        """Whether the engine takes requests by its own report, and is in no doubt of being the discovered one."""
        self._counts: tuple[int, ...] = (0, 0)
        """Running counts of the last page: prompt tokens, and those that were not cached."""
        self._prompt_rate = PromptRate()
        """What the pages of an aggregated engine show of its prompt tokens per second."""

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
    def group(self) -> str | None:
        return self.configured.group

    @property
    def pairing_key(self) -> PairingKey:
        return pairing_key(self.facts, self.configured.group)

    @property
    def tokens(self) -> float:
        """The load of all ranks."""
        return sum(sum(group.loads) for group in self.groups)

    @property
    def requests(self) -> float:
        """Sequences in flight, with the external ones."""
        return sum(group.requests + group.external_requests for group in self.groups)

    @property
    def reserved_requests(self) -> float:
        """Sequences in flight that have reservations."""
        return sum(group.requests for group in self.groups)

    @property
    def reservations(self) -> int:
        """Open reservations of all ranks; a request whose rank the engine picks has one on each."""
        return sum(len(rank.open) for rank in self.ranks)

    @property
    def expired(self) -> int:
        """Reservations that have expired."""
        return sum(group.expired for group in self.groups)

    @property
    def tpot(self) -> float | None:
        """Mean seconds per output token, as the engine reports; None if it has not."""
        groups = [group for group in self.groups if isinstance(group, DecodeGroup)]
        reported = [tpot for group in groups if (tpot := group.pace.reported) is not None]
        return sum(reported) / len(reported) if reported else None

    @property
    def time_per_prompt_token(self) -> float | None:
        """Mean seconds of a rank per prompt token, as the engine counts its steps; None if it has not."""
        known = [each.seconds_per_token for each in self.prefill_speeds if each.seconds_per_token is not None]
        return fmean(known) if known else None

    @property
    def waiting_prompts(self) -> Work:
        """The prompts that no step has taken in yet. Of an aggregated endpoint they are those of the last samples."""
        if self.role is Role.PREFILL:
            each = [group.waiting for group in self.groups if isinstance(group, PrefillGroup)]
        else:
            samples = [rank.sample for rank in self.ranks if rank.sample is not None]
            each = [Work(sample.waiting_uncached_tokens or 0, sample.waiting_requests) for sample in samples]
        return Work(sum(work.tokens for work in each), sum(work.requests for work in each))

    @property
    def prompt_rate(self) -> float | None:
        """Prompt tokens that all ranks together can compute per second; None if that is unknown."""
        if self.role is not Role.PREFILL:
            return self._prompt_rate.per_second
        rates = [group.tokens_per_second for group in self.groups if isinstance(group, PrefillGroup)]
        known = [rate for rate in rates if rate is not None]
        return sum(known) / len(known) * len(rates) if known else None

    def takes(self, now: float) -> bool:
        """Return whether the engine is ready, and not ejected; after an ejection it takes one request at a time."""
        return self.is_ready and self.health.takes(now)

    def freshness(self, now: float, stale_after: float) -> Freshness:
        if self.sampled_at == -math.inf:
            return Freshness.UNKNOWN
        if self.is_gone or now - self.seen_at > stale_after:
            return Freshness.STALE
        return Freshness.SUSPECT if self.is_suspect else Freshness.FRESH

    @property
    def is_suspect(self) -> bool:
        """Whether the scheduler of every rank that can serve stands still."""
        return bool(stuck := self.suspect_groups) and all(part.group in stuck for part in self._usable.parts)

    @property
    def suspect_groups(self) -> Sequence[StepGroup]:
        """The step groups whose scheduler stands still."""
        return self._standstill.stuck

    @property
    def seen_at(self) -> float:
        """When the endpoint last had a sample or a response: an engine that responds is no stale one."""
        return max(self.sampled_at, self.answered_at)

    def absorb(self, samples: tuple[RankSample, ...], started: float, now: float) -> None:
        """Correct the load by a page that was requested at *started*; samples of unknown ranks have no effect."""
        before, self.sampled_at = self.sampled_at, started
        self.is_gone = False
        readings = [
            Reading(rank, sample, _moment_of(sample, started, rank, before))
            for sample in samples
            if 0 <= sample.dp_rank < len(self.ranks)
            for rank in [self.ranks[sample.dp_rank]]
        ]
        self.has_external_requests = False
        if readings:
            ours = sum(each.requests for rank in self.ranks for kept in (rank.open, rank.ended) for each in kept)
            doubtful = sum(reading.rank.doubtful_requests(reading.at) for reading in readings)
            absorb(readings, len(self.ranks), now)
            if any(each.sample.age is None for each in readings):  # of an unknown time, so it may contain any of ours
                beyond, doubtful = sum(each.requests for each in readings) - ours, 0.0
            else:
                beyond = sum(rank.external_requests for rank in self.ranks)
            if beyond >= EXTERNAL_FROM:
                self.has_external_requests = True if beyond - doubtful >= EXTERNAL_FROM else None

    def leave_out(self, rank: int, now: float) -> None:
        """Pick a rank no more for some seconds, because its engine does not use it. One rank always remains."""
        self._left_out[rank] = now + INACTIVE_SECONDS
        self._choose()

    def review(self, now: float) -> bool:
        """Detect by a page that was just absorbed what stands still, and return whether that has changed.

        Ranks that were left out for long enough are picked again.
        """
        for group, speed in zip(self.groups, self.prefill_speeds, strict=True):
            counts = [rank.sample.prefilled for rank in group.ranks if rank.sample is not None]
            if self.capabilities.times_prefill and (known := [each for each in counts if each is not None]):
                speed.learn(PrefillSteps(fmean(each.tokens for each in known), fmean(each.seconds for each in known)))
        if self._left_out and min(self._left_out.values()) <= now:
            self._left_out = {rank: until for rank, until in self._left_out.items() if now < until}
            self._choose()
        answered_at = self.answered_at if self.role is Role.PREFILL else -math.inf
        if not self._standstill.review(answered_at, self.sampled_at, now):
            return False
        self._choose()
        return True

    def _choose(self) -> None:
        """Leave out ranks that are suspect or not in use, as far as there are others."""
        stuck, active = self.suspect_groups, self._usable.only(lambda rank: rank.index not in self._left_out)
        usable = active or self._usable
        self.candidate = usable.only(lambda rank: rank.group not in stuck) or usable

    def detect_restart(self, page: LoadPage) -> bool:
        """Note the running counts of a page, and return whether they have begun anew since the page before."""
        before, counts = self._counts, (page.prompt_tokens, page.uncached_prompt_tokens)
        self._counts = tuple(then if now is None else now for now, then in zip(counts, before, strict=True))
        return any(now < then for now, then in zip(self._counts, before, strict=True))

    def learn_prompt_rate(self, page: LoadPage, started: float) -> None:
        """Learn from a page, requested at *started*, how many prompt tokens this aggregated endpoint computes."""
        waits = all(sample.waiting_uncached_tokens for sample in page.ranks)
        self._prompt_rate.learn(page.uncached_prompt_tokens, waits=waits, at=started)

    def forget_external(self, now: float) -> None:
        """Drop the external load until the next page: that of the last one is out of date."""
        for group in self.groups:
            group.forget_external(now)

    def reserve(
        self, rank: int | None, tokens: float, now: float, requests: float = 1.0, cached: float = 0.0
    ) -> tuple[Reservation, ...]:
        """Reserve what a request needs on one rank, or an equal share on each if the engine picks the rank (None).

        See :meth:`RankLoad.reserve`.
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
    """The DP rank that will serve; None if the engine picks it."""
    routed: bool
    """Whether routing fields name the rank. If not, the bootstrap room leads to it, or the engine picks."""
    by_room: bool
    """Whether the bootstrap room must lead to the rank."""
    cached: float = 0.0
    """Tokens of the prompt that are expected in the rank's prefix cache."""

    @property
    def residue(self) -> tuple[int, int] | None:
        """Return ``(rank, ranks)`` for the bootstrap room; None if it need not lead to the rank."""
        return self.endpoint.facts.position_of(self.rank) if self.by_room and self.rank is not None else None

    @property
    def global_rank(self) -> int | None:
        """Return the rank as an engine of several nodes counts it; None if the engine picks it."""
        return None if self.rank is None else self.endpoint.facts.position_of(self.rank)[0]


def _candidate(endpoint: EndpointLoad, ranks: Sequence[RankLoad]) -> Candidate:
    parts = []
    for group in endpoint.groups:
        positions = [rank.position for rank in ranks if rank.group is group]
        if positions:
            parts.append(Part(group, None if len(positions) == len(group.ranks) else positions))
    return Candidate(endpoint, tuple(parts))


def _groups(role: Role, facts: EngineFacts, costs: StepCosts) -> Sequence[StepGroup]:
    """Make the step groups of an engine: one of all ranks with DP attention, otherwise one of each rank."""
    size = facts.dp_ranks
    members = [range(size)] if facts.dp_attention else [range(index, index + 1) for index in range(size)]
    if role is Role.PREFILL:
        return [
            PrefillGroup(each, budget=facts.step_tokens, chunked=facts.chunked, step_cost=costs.prefill_step)
            for each in members
        ]
    computes = role is Role.WORKER
    return [DecodeGroup(each, request_tokens=costs.decode_request, computes=computes) for each in members]


def _moment_of(sample: RankSample, started: float, rank: RankLoad, before: float) -> float:
    """Return the earliest time at which a sample can have been taken.

    A page has a time stamp, or its samples may be of any age. While such a sample stays the same, it is as old as it
    was. A changed one is younger than the page before.
    """
    if sample.age is not None:
        return started - sample.age
    return rank.sampled_at if sample == rank.sample else max(rank.sampled_at, before)
