"""Who is compared, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final


@dataclass(frozen=True, slots=True)
class Ours:
    """Envoy and the service."""

    name: str
    policy: Mapping[str, str] = field(default_factory=dict)
    """Section ``policy`` of the pool."""
    signal: str = "estimate"
    """``load.signal``."""


@dataclass(frozen=True, slots=True)
class Smg:
    """The Rust gateway of SGLang's ecosystem, from PyPI."""

    name: str
    policy: str
    picks_ranks: bool = True
    """Whether it names DP ranks. If so, prefill servers must not follow rooms: it draws rooms that have nothing to do
    with the rank it names, and prefill refuses such requests (``follow_bootstrap_room conflict``, SGLang since 0.5.11).
    It is given prefill servers with ``--load-balance-method round_robin``, which do as they are told."""
    flags: tuple[str, ...] = ()
    interval: float = 10.0
    """Seconds between two looks at the engines' load; 10 is its default."""


Contender = Ours | Smg

ENGINES_OWN: Final = "engines' own"
"""The baseline: a random server, and the rank that SGLang's default picks (the room's on prefill, round robin on
decode)."""
DEFAULT: Final = "dp-extproc"

_MINIMUM_TOKENS: Final = ("--dp-minimum-tokens-scheduler",)
_POLICIES: Final = ("random", "round_robin", "cache_aware")

CONTENDERS: Final[Sequence[Contender]] = (
    Ours(ENGINES_OWN, {"host": "random", "dp_rank": "none"}),
    Ours(DEFAULT),
    Ours("ours least_tokens", {"host": "least_tokens"}),
    Ours("ours least_requests", {"host": "least_requests"}),
    Ours("ours round_robin", {"host": "round_robin"}),
    Ours("ours random", {"host": "random"}),
    Ours("ours power_of_two", {"host": "power_of_two"}),
    Ours("ours token_round_robin", {"dp_rank": "token_round_robin"}),
    Ours("ours scraped", {"host": "random"}, signal="scraped"),
    *(Smg(f"smg {policy} 1 s", policy, flags=_MINIMUM_TOKENS, interval=1.0) for policy in _POLICIES),
    *(Smg(f"smg {policy} 10 s", policy, flags=_MINIMUM_TOKENS) for policy in _POLICIES),
    *(Smg(f"smg {policy} no ranks", policy, picks_ranks=False) for policy in _POLICIES),
    *(Smg(f"smg {policy} dp-aware", policy, flags=("--dp-aware",), interval=1.0) for policy in _POLICIES),
    *(
        Smg(f"smg {policy} dp-aware", policy, flags=("--dp-aware",), interval=1.0)
        for policy in ("power_of_two", "least_load")
    ),
)

MAIN: Final = (ENGINES_OWN, DEFAULT, "ours scraped", "smg * 1 s", "smg * 10 s")
"""Who is compared unless something else is asked for."""


def chosen(patterns: Sequence[str]) -> list[Contender]:
    """Give the contenders whose names match, as shells match, and always the baseline.

    Raises:
        ValueError: A pattern matches nobody.
    """
    for pattern in patterns:
        if not any(fnmatchcase(contender.name, pattern) for contender in CONTENDERS):
            names = ", ".join(contender.name for contender in CONTENDERS)
            raise ValueError(f"nobody is called {pattern!r}; there are: {names}")
    wanted = (ENGINES_OWN, *patterns)
    return [each for each in CONTENDERS if any(fnmatchcase(each.name, pattern) for pattern in wanted)]
