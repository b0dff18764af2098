"""Run the fleet of the demo: two prefill and two decode engines of four ranks each, and a router in front of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from dp_extproc.lab.demo.interrupts import Interrupts
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config

MODEL: Final = "demo"
RANKS: Final = 4
PER_ROLE: Final = 2
_KV_TOKENS: Final = "440000"
"""KV room of a rank: about that of a large model on one H200."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A way to schedule requests, with its printed name."""

    name: str
    policy: dict[str, str]
    """Section ``policy`` of the pool."""


ENGINES_OWN: Final = Placement("the engines' own", {"host": "random", "dp_rank": "none"})
OURS: Final = Placement("dp-extproc", {})


@dataclass(frozen=True, slots=True)
class Router:
    """The service and Envoy, with one placement."""

    service: ServiceProcess
    envoy: EnvoyProcess


class Fleet:
    """The engines of the demo."""

    def __init__(self, prefill: list[EngineProcess], decode: list[EngineProcess], interrupts: Interrupts) -> None:
        self.prefill = prefill
        self.decode = decode
        self._interrupts = interrupts

    @contextmanager
    def router(self, placement: Placement) -> Iterator[Router]:
        """Run a router in front of the engines."""
        pool: dict[str, Any] = {
            "models": ["*"],
            "prefill": {"endpoints": [engine.url for engine in self.prefill]},
            "decode": {"endpoints": [engine.url for engine in self.decode]},
            "policy": placement.policy,
        }
        service = ServiceProcess(write_config([pool]), pause=self._interrupts.pause)
        envoy = EnvoyProcess(service.config, pause=self._interrupts.pause)
        with ExitStack() as running:
            for process in (service, envoy):
                running.push(process)
                process.start()
                self._interrupts.check()
            service.wait_until_listening()
            envoy.wait_until_ready()
            service.wait_until_fresh()
            service.wait_until_ready()
            yield Router(service, envoy)

    def named(self) -> dict[str, EngineProcess]:
        """Return the engines by their printed names."""
        roles = (("prefill", self.prefill), ("decode", self.decode))
        return {f"{role} {number}": engine for role, engines in roles for number, engine in enumerate(engines, 1)}


@contextmanager
def run_engines(time_scale: float, interrupts: Interrupts) -> Iterator[Fleet]:
    """Run the engines, so many times slower than the default ones."""
    flags = (
        *("--dp-attention", "--model", MODEL, "--time-scale", str(time_scale), "--max-total-tokens", _KV_TOKENS),
        "--disable-radix-cache",  # both placements get the same prompts: the second would find those of the first
    )
    roles = [role for role in ("prefill", "decode") for _ in range(PER_ROLE)]
    engines = [EngineProcess(role, RANKS, *flags, pause=interrupts.pause) for role in roles]
    with ExitStack() as running:
        for engine in engines:
            running.push(engine)
            engine.start()
            interrupts.check()
        for engine in engines:
            engine.wait_until_listening()
        yield Fleet(engines[:PER_ROLE], engines[PER_ROLE:], interrupts)
