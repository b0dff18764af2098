"""A fleet as its engines would have reported it, without any engine."""

from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import Any

from dp_extproc.config import PoolConfig
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Mode, RankSample, Role, Version
from dp_extproc.load.attribution import Reading, absorb
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import DEFAULT_COSTS, EndpointLoad, StepCosts
from dp_extproc.load.step_group import StepGroup
from dp_extproc.scheduling.scheduler import Scheduler

MODES = {Role.PREFILL: Mode.PREFILL, Role.DECODE: Mode.DECODE, Role.WORKER: Mode.UNIFIED}


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_tokens() -> Callable[[], str]:
    """Give different tokens, though they are easy to guess."""
    numbers = count(1)
    return lambda: f"token-{next(numbers)}"


def make_facts(
    role: Role,
    version: tuple[int, int, int] = (0, 5, 23),
    ranks: int = 4,
    *,
    dp_attention: bool = True,
    method: str | None = None,
) -> EngineFacts:
    """Make what an engine with default flags reports."""
    if method is None and version >= (0, 5, 8):
        method = "follow_bootstrap_room" if role is Role.PREFILL else "round_robin"
    follows = role is not Role.WORKER and (version < (0, 5, 8) or method == "follow_bootstrap_room")
    return EngineFacts(
        version=Version(*version),
        dp_ranks=ranks,
        mode=MODES[role],
        dp_attention=dp_attention,
        served_model="served",
        bootstrap_port=8998 if role is Role.PREFILL else None,
        load_balance_method=method,
        follows_rooms=follows,
    )


def make_endpoint(role: Role, number: int = 1, pool: str = "*") -> Endpoint:
    port = {Role.PREFILL: 31000, Role.DECODE: 32000, Role.WORKER: 33000}[role] + number
    return Endpoint(f"http://10.0.0.{number}:{port}", f"10.0.0.{number}", port, pool, role)


def address_of(endpoint: Endpoint) -> str:
    return f"{endpoint.host}:{endpoint.port}"


def samples(tokens: Sequence[int], age: float | None = 0.0) -> tuple[RankSample, ...]:
    """Make samples of ranks that have so many tokens in use or queued; prefill ranks have yet to compute them."""
    return tuple(
        RankSample(
            rank,
            used_tokens=count,
            total_tokens=count,
            waiting_uncached_tokens=count,
            waiting_requests=1 if count else 0,
            age=age,
        )
        for rank, count in enumerate(tokens)
    )


def absorb_sample(group: StepGroup, sample: RankSample, at: float) -> None:
    """Correct one rank of a group, as if it were alone in its engine, by a sample that comes without delay."""
    absorb([Reading(group.ranks[sample.dp_rank], sample, at)], 1, at)


class Fleet:
    """A pool that has been discovered and sampled, and the scheduler over it."""

    def __init__(
        self,
        *,
        prefills: Sequence[EngineFacts] = (),
        decodes: Sequence[EngineFacts] = (),
        workers: Sequence[EngineFacts] = (),
        policy: dict[str, Any] | None = None,
        seed: int = 1,
        sampled: bool = True,
        costs: StepCosts = DEFAULT_COSTS,
        routing_fields: str = "body",
    ) -> None:
        self.clock = Clock()
        by_role = {Role.PREFILL: prefills, Role.DECODE: decodes, Role.WORKER: workers}
        facts = {
            make_endpoint(role, number): each
            for role, several in by_role.items()
            for number, each in enumerate(several, start=1)
        }
        self.endpoints = list(facts)
        self.load = LoadCache(self.endpoints, 5.0, costs)
        for endpoint, each in facts.items():
            self.load.discovered(endpoint, address_of(endpoint), each, self.clock())
            if sampled:
                self.sample(endpoint, [0] * each.dp_ranks)
        sections = {"prefill": Role.PREFILL, "decode": Role.DECODE, "workers": Role.WORKER}
        self.pool = PoolConfig.model_validate({
            "models": ["*"],
            "policy": policy or {},
            "routing_fields": routing_fields,
            **{
                key: {"endpoints": [endpoint.url for endpoint in self.endpoints if endpoint.role is role]}
                for key, role in sections.items()
                if by_role[role]
            },
        })  # fmt: skip
        self.scheduler = self.make_scheduler(rng=Random(seed))

    def make_scheduler(self, **parts: Any) -> Scheduler:
        """Make another scheduler of the fleet. *parts* replace or join those that every test needs."""
        usual: dict[str, Any] = {
            "owner": "127.0.0.1:9002",
            "rng": Random(1),
            "draw_token": make_tokens(),
            "clock": self.clock,
        }
        return Scheduler([self.pool], self.load, **(usual | parts))

    def sample(self, endpoint: Endpoint, tokens: Sequence[int], age: float | None = 0.0) -> None:
        self.load.sampled(endpoint, LoadPage(samples(tokens, age)), self.clock(), self.clock())

    def endpoint(self, role: Role, number: int = 1) -> EndpointLoad:
        return self.load.by_url[make_endpoint(role, number).url]

    def eligible(self, role: Role) -> list[EndpointLoad]:
        """Return the endpoints of a role with the freshest loads."""
        return self.load.best_known(self.load.known("*", role), self.clock())[1]
