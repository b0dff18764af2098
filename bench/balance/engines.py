"""The engines of one run: started fresh, so that load and caches are empty, and read at the end."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.engine.scheduler.rank import Limits
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.workload.capacity import Topology

MODEL: Final = "bench"
RELEASE: Final = "0.5.21"
"""The last release that reports its ranks under the name that smg reads (``dp_size``)."""
COSTS: Final = Costs(prefill_step=0.03, prefill_token=100e-6)
"""Costs of a large mixture-of-experts model: 37,000 prompt tokens per second on four full ranks."""
STREAM_INTERVAL: Final = 16
"""Tokens per chunk; one chunk per token would be most of the machine's work, and does not depend on scheduling."""


@dataclass(frozen=True, slots=True)
class Size:
    """Size of the engines."""

    topology: Topology
    chunk: int = 4096
    """Prompt tokens per rank and step."""
    capacity: int = 440_000
    """KV tokens per rank: about those of a large model on one H200."""
    max_running: int = 256
    """Sequences per rank."""
    time_scale: float = 1.0

    @property
    def limits(self) -> Limits:
        return Limits(self.capacity, self.max_running, self.chunk)

    def flags(self) -> tuple[str, ...]:
        """List the options that all engines share."""
        ranks = self.topology.ranks
        return (
            *("--dp-attention", "--model", MODEL, "--sglang-version", RELEASE, "--time-scale", str(self.time_scale)),
            *("--max-total-tokens", str(self.capacity), "--max-running-requests", str(self.max_running * ranks)),
            *("--chunked-prefill-size", str(self.chunk * ranks), "--stream-interval", str(STREAM_INTERVAL)),
            # /health does not become slower with the engines.
            *("--timeout-health", str(1 / self.time_scale)),
            *("--cost-prefill-step", str(COSTS.prefill_step), "--cost-prefill-token", str(COSTS.prefill_token)),
        )


@dataclass(frozen=True, slots=True)
class Account:
    """Totals of a run, as the engines of one role report them."""

    wait_share: float
    """Fraction of the time in steps that the average rank waited for the fullest one."""
    imbalance: float
    """Tokens of an engine's busiest rank against its average rank: computed ones on prefill, generated ones on decode.

    The mean over the engines.
    """
    cached_share: float
    """Fraction of the prompt tokens that were cached."""


@dataclass(frozen=True, slots=True)
class Engines:
    """The running engines."""

    prefill: Sequence[EngineProcess]
    decode: Sequence[EngineProcess]

    @property
    def pids(self) -> list[int]:
        return [engine.pid for engine in (*self.prefill, *self.decode)]

    def account(self, role: str) -> Account:
        """Read the totals of the engines of a role."""
        groups = [group for engine in (self.prefill if role == "prefill" else self.decode) for group in engine.steps()]
        key = "computed_tokens" if role == "prefill" else "generated_tokens"
        seconds = sum(group["seconds"] for group in groups)
        computed, cached = (_total(groups, name) for name in ("computed_tokens", "cached_tokens"))
        return Account(
            wait_share=sum(group["waited"] for group in groups) / max(seconds, 1e-9),
            imbalance=sum(_imbalance([rank[key] for rank in group["ranks"]]) for group in groups) / len(groups),
            cached_share=cached / max(1, computed + cached),
        )


@contextmanager
def run_engines(size: Size, *prefill_flags: str) -> Iterator[Engines]:
    """Run the engines.

    Args:
        size: Their number and size.
        prefill_flags: Further options of prefill engines.
    """
    topology, flags = size.topology, size.flags()
    prefill = [EngineProcess("prefill", topology.ranks, *flags, *prefill_flags) for _ in range(topology.prefill)]
    decode = [EngineProcess("decode", topology.ranks, *flags) for _ in range(topology.decode)]
    with ExitStack() as running:
        for engine in (*prefill, *decode):
            running.push(engine)
            engine.start()
        for engine in (*prefill, *decode):
            engine.wait_until_listening()
        yield Engines(prefill, decode)


def _total(groups: Sequence[dict[str, Any]], key: str) -> int:
    return sum(rank[key] for group in groups for rank in group["ranks"])


def _imbalance(tokens: Sequence[int]) -> float:
    return max(tokens) * len(tokens) / sum(tokens) if any(tokens) else 1.0
