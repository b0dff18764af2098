"""The compared routers and their settings, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final


@dataclass(frozen=True, slots=True)
class Ours:
    """Envoy and dp-extproc."""

    name: str
    policy: Mapping[str, str] = field(default_factory=dict)
    """Section ``policy`` of the pool."""
    signal: str = "estimate"
    """The value of ``load.signal``."""


@dataclass(frozen=True, slots=True)
class Smg:
    """The Rust gateway of SGLang's ecosystem, from PyPI."""

    name: str
    policy: str
    picks_ranks: bool = True
    """Whether it names DP ranks.

    If so, prefill engines must not follow rooms: smg draws rooms without regard to the rank that it names, and prefill
    rejects such requests (``follow_bootstrap_room conflict``, SGLang since 0.5.11). Its prefill engines run with
    ``--load-balance-method round_robin``, by which they follow the named rank.
    """
    flags: tuple[str, ...] = ()
    interval: float = 10.0
    """Seconds between two reads of the engines' load; smg's default is 10."""


Contender = Ours | Smg

ENGINES_OWN: Final = "engines' own"
"""The baseline: a random endpoint, and the rank of SGLang's default (the room's on prefill, round robin on decode)."""
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
"""The contenders of a run without other options."""


def chosen(patterns: Sequence[str]) -> list[Contender]:
    """Select the contenders by shell patterns, and always the baseline.

    Raises:
        ValueError: A pattern matches no contender.
    """
    for pattern in patterns:
        if not any(fnmatchcase(contender.name, pattern) for contender in CONTENDERS):
            names = ", ".join(contender.name for contender in CONTENDERS)
            raise ValueError(f"no contender is called {pattern!r}; there are: {names}")
    wanted = (ENGINES_OWN, *patterns)
    return [each for each in CONTENDERS if any(fnmatchcase(each.name, pattern) for pattern in wanted)]
