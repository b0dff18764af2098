"""The fleet of the demo: two prefill and two decode engines of four ranks each, and a router in front of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from dp_extproc.demo.probe import LoadProbe
from dp_extproc.demo.traffic import MODEL
from dp_extproc.testbed.engine import EngineProcess
from dp_extproc.testbed.envoy import EnvoyProcess
from dp_extproc.testbed.service import ServiceProcess, write_config

RANKS: Final = 4
SERVERS: Final = 2
_KV_TOKENS: Final = "440000"
"""KV room of a rank: about that of a large model on one H200."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A way to place requests, and what a reader calls it."""

    name: str
    policy: dict[str, str]
    """Section ``policy`` of the pool."""


ENGINES_OWN: Final = Placement("the engines' own", {"host": "random", "dp_rank": "none"})
OURS: Final = Placement("dp-extproc", {})


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank got."""

    server: str
    rank: int
    requests: int
    tokens: int
    """Of their prompts."""
    load: float
    """Tokens that it held or had queued, on average over the run."""


@dataclass(frozen=True, slots=True)
class Router:
    """The service and Envoy, with one placement."""

    service: ServiceProcess
    envoy: EnvoyProcess


class Fleet:
    """The engines."""

    def __init__(self, prefill: list[EngineProcess], decode: list[EngineProcess]) -> None:
        self.prefill = prefill
        self.decode = decode

    @contextmanager
    def router(self, placement: Placement) -> Iterator[Router]:
        """Run a router in front of the engines."""
        pool: dict[str, Any] = {
            "models": ["*"],
            "prefill": {"endpoints": [engine.url for engine in self.prefill]},
            "decode": {"endpoints": [engine.url for engine in self.decode]},
            "policy": placement.policy,
        }
        with ServiceProcess(write_config([pool])) as service, EnvoyProcess(service.config) as envoy:
            service.wait_until_fresh()
            service.wait_until_ready()
            yield Router(service, envoy)

    def named(self) -> dict[str, EngineProcess]:
        """Give the engines by the names that a reader sees."""
        roles = (("prefill", self.prefill), ("decode", self.decode))
        return {f"{role} {number}": engine for role, engines in roles for number, engine in enumerate(engines, 1)}

    def forget(self) -> None:
        """Let the engines forget what they have received."""
        for engine in (*self.prefill, *self.decode):
            engine.forget()

    def shares(self, probe: LoadProbe) -> list[RankShare]:
        """Tell what each rank got since :meth:`forget`."""
        shares = []
        for server, engine in self.named().items():
            requests = engine.requests()
            for rank in range(RANKS):
                legs = [leg for request in requests for leg in request["legs"] if leg["dp_rank"] == rank]
                tokens = sum(leg["prompt_tokens"] for leg in legs)
                shares.append(RankShare(server, rank, len(legs), tokens, probe.mean_tokens(server, rank)))
        return shares


@contextmanager
def run_engines(time_scale: float) -> Iterator[Fleet]:
    """Run the engines, so many times slower than the default ones."""
    flags = (
        *("--dp-attention", "--model", MODEL, "--time-scale", str(time_scale), "--max-total-tokens", _KV_TOKENS),
        "--disable-radix-cache",  # both placements get the same prompts: the second would find those of the first
    )
    with ExitStack() as running:
        engines = [EngineProcess(role, RANKS, *flags) for role in ("prefill", "decode") for _ in range(SERVERS)]
        for engine in engines:
            running.push(engine)
            engine.start()
        for engine in engines:
            engine.wait_until_listening()
        yield Fleet(engines[:SERVERS], engines[SERVERS:])
