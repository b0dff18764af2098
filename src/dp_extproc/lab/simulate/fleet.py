"""Describe what is simulated: how many engines, how large and how fast."""

import math
from dataclasses import dataclass, field
from itertools import accumulate

from dp_extproc.engines.model import Role
from dp_extproc.lab.engine.scheduler.costs import Costs


@dataclass(frozen=True, slots=True)
class Fleet:
    """Describe prefill and decode engines, or aggregated ones."""

    prefill: int = 4
    """0 for aggregated engines, which do both."""
    decode: int = 2
    """Decode engines, or the aggregated ones."""
    ranks: int = 8
    lockstep: bool = True
    """Whether the ranks of an engine step together, as with DP attention. If not, each rank has steps of its own."""
    chunk: int = 4096
    """Prompt tokens per rank and step; 0 for no chunks."""
    batch: int = 16384
    """Prompt tokens per rank and step without chunks; a longer prompt runs alone."""
    capacity: int = 440_000
    """KV tokens of a rank."""
    prefix_cache: bool = False
    """Whether prefill ranks keep what they have computed."""
    costs: Costs = field(default_factory=lambda: Costs(prefill_step=0.03, prefill_token=100e-6))
    """By default those of a large mixture-of-experts model: 75,000 prompt tokens per second on eight full ranks."""
    groups: tuple[tuple[int, int], ...] = ()
    """Prefill and decode engines of each revision group, the first engines in the first group. Empty for no groups."""
    slow_prefill: float = 1.0
    """How many times longer the steps of the first prefill engine take."""
    slow_decode: float = 1.0
    """How many times longer the steps of the first decode engine take."""

    def group_of(self, role: Role, index: int) -> str | None:
        """Return the revision group of an engine; None if there are no groups."""
        ends = accumulate(prefill if role is Role.PREFILL else decode for prefill, decode in self.groups)
        return next((f"v{number}" for number, end in enumerate(ends, start=1) if index < end), None)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Describe the network, the replicas and what the router learns. Times in seconds."""

    network: float = 0.001
    """One way, between any two."""
    handshake: float = 0.004
    """From the arrival of both legs until prefill may start, if decode has room."""
    scrape_interval: float = 1.0
    stale_after: float = math.inf
    """Age from which a sample is stale."""
    mute: float = 0.0
    """Share of the time in which an engine cannot be read, 20 seconds each time."""
    replicas: int = 1
    """Replicas of the router; requests go to any of them."""
    sync: float | None = None
    """How long the events of one replica take to the others; None for no exchange."""
    error_sigma: float = 0.0
    """Sigma of the logarithm of the error of prompt lengths, as the router estimates them."""
    bias: float = 1.0
    """Factor of all estimates, until the router has learned the token ratio from the engines' counts."""
    underrated: float = 0.0
    """Share of the requests that are estimated at a quarter of their length."""
    answers: bool = True
    """Whether the router gets the events of prefill and first token; if not, only the end."""
    scrapes: bool = True
    """Whether engines report their load at all."""
    lying: bool = False
    """Whether engines report numbers that are not those of their load."""
    direct_share: float = 0.0
    """Share of the requests that do not pass the router: the engines pick their ranks."""
    aborts: float = 0.0
    """Share of the requests whose clients leave if they wait in a queue too long; none of these is in the results."""
    patience: float = 0.5
    """Seconds that those clients wait on average."""
