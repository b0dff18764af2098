"""The room of decode and aggregated endpoints: what their KV caches and their batches hold, and what is taken of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from dp_extproc.load.decode import ROOM, DecodeGroup
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.records import NO_WORK, Work


@dataclass(frozen=True, slots=True)
class Room:
    """Sums over the ranks that report how many they can have; a capacity of zero is unknown."""

    tokens: float
    """Tokens in the KV caches, or that will be there when the requests in flight have started."""
    capacity: int
    """Tokens that the KV caches can hold."""
    requests: float
    """Sequences in flight."""
    sequences: int
    """Sequences that run at a time."""

    @classmethod
    def of(cls, endpoints: Iterable[EndpointLoad], now: float, queued: Work = NO_WORK) -> Self:
        """Sum up decode or aggregated endpoints, with requests that are queued for them."""
        tokens, requests = queued
        capacity = sequences = 0
        for endpoint in endpoints:
            for rank in endpoint.ranks:
                sample, group = rank.sample, rank.group
                if sample is None or not isinstance(group, DecodeGroup):
                    continue
                if sample.capacity_tokens:
                    capacity += sample.capacity_tokens
                    tokens += group.kv_tokens(rank.position, now)
                if sample.max_running_requests:
                    sequences += sample.max_running_requests
                    requests += rank.reserved_requests + rank.external_requests
        return cls(tokens, capacity, requests, sequences)

    @property
    def excess(self) -> float:
        """Tokens of requests that no KV cache has room for. Such a request waits before its prompt is computed."""
        return max(0.0, self.tokens - ROOM * self.capacity) if self.capacity else 0.0

    @property
    def is_full(self) -> bool:
        """Whether further requests wait for room."""
        full_caches = self.capacity and self.tokens >= ROOM * self.capacity
        full_batches = self.sequences and self.requests >= ROOM * self.sequences
        return bool(full_caches or full_batches)
