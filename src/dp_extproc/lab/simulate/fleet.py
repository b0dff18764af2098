"""What is simulated: how many servers, how large, how fast."""

import math
from dataclasses import dataclass, field

from dp_extproc.lab.engine.scheduler.costs import Costs


@dataclass(frozen=True, slots=True)
class Fleet:
    """Servers with DP attention: the ranks of each take their steps together."""

    prefill: int = 4
    decode: int = 2
    ranks: int = 8
    chunk: int = 4096
    """Prompt tokens per rank and step; 0 for no chunks."""
    batch: int = 16384
    """Prompt tokens per rank and step without chunks; a longer prompt runs alone."""
    capacity: int = 440_000
    """KV tokens of a rank."""
    prefix_cache: bool = False
    """Whether prefill ranks keep what they have computed."""
    costs: Costs = field(default_factory=lambda: Costs(prefill_step=0.03, prefill_token=100e-6))
    """By default of a large mixture-of-experts model: 75,000 prompt tokens per second on eight full ranks."""
    slow_prefill: float = 1.0
    """How many times longer the steps of the first prefill server take."""
    slow_decode: float = 1.0
    """Likewise of the first decode server."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What lies between clients, router and engines, and what the router gets to know. Times in seconds."""

    network: float = 0.001
    """One way, between any two."""
    handshake: float = 0.004
    """From the arrival of both legs until prefill may start, if decode has room."""
    scrape_interval: float = 1.0
    stale_after: float = math.inf
    """Age from which a reading is stale."""
    mute: float = 0.0
    """Share of its readings that an engine does not answer; it is silent for 20 seconds at a time."""
    replicas: int = 1
    """Of the router; requests go to any of them."""
    sync: float | None = None
    """How long one replica's news takes to the others; None: they are blind."""
    error_sigma: float = 0.0
    """Of the logarithm of the error of prompt lengths, as the router estimates them."""
    bias: float = 1.0
    """Factor of all estimates, until the router has learned from the engines' counts how long texts are."""
    underrated: float = 0.0
    """Share of the requests that are taken for a quarter of their length."""
    answers: bool = True
    """Whether the router hears of the end of prefill and of the first token; if not, only of the end."""
    scrapes: bool = True
    """Whether engines tell their load at all."""
    lying: bool = False
    """Whether they tell numbers that have nothing to do with it."""
    direct_share: float = 0.0
    """Share of the requests that do not pass the router: the engines place them."""
    aborts: float = 0.0
    """Share of the requests whose clients leave if they wait in a queue too long; none of these is in the results."""
    patience: float = 0.5
    """Seconds that those clients wait on average."""
