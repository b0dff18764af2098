"""One contender, one trace: a run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.balance.client import Failed, Load, make_jobs, send
from bench.balance.contenders import Contender, Smg
from bench.balance.engines import Account, Size, run_engines
from bench.balance.machine import Usage
from bench.balance.routers import run_router
from dp_extproc.lab.simulate.outcome import Outcome, RunResult
from dp_extproc.lab.workload.trace import Segment, TraceRequest

_WARM_UP = 8
"""Requests that open connections and let decode ranks find prefill ranks."""
_SETTLING = 0.2
"""Share of the requests at the start that is left out of the times: they meet an empty fleet."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it."""

    contender: str
    seed: int
    times: dict[str, float]
    """Milliseconds: mean, p50 and p99 of ``ttft``, ``tpot`` and ``e2e``, without the first fifth of the requests."""
    answered: int
    failed: Sequence[Failed]
    prefill: Account
    decode: Account
    machine: float
    """Share of the processors' time that was not idle ..."""
    ours: float
    """... and the part of it that went to client, router and engines. The rest is what others did meanwhile."""

    def numbers(self) -> dict[str, float]:
        """Give what a table shows."""
        return {
            **self.times,
            "failed": len(self.failed),
            "prefill_wait": self.prefill.wait_share,
            "decode_wait": self.decode.wait_share,
            "prefill_imbalance": self.prefill.imbalance,
            "decode_imbalance": self.decode.imbalance,
            "cached": self.prefill.cached_share,
            "machine": self.machine,
            "ours": self.ours,
        }

    def as_json(self) -> dict[str, Any]:
        """Give all of it; of the failures the first five."""
        failures = [asdict(each) for each in self.failed[:5]]
        return {
            "contender": self.contender,
            "seed": self.seed,
            "answered": self.answered,
            "failures": failures,
            **self.numbers(),
        }


def run_once(
    contender: Contender,
    seed: int,
    trace: Sequence[TraceRequest],
    *,
    size: Size,
    load: Load,
    on_done: Callable[[], None],
) -> Run:
    """Start engines and the contender's router, send the trace, ask the engines, stop everything."""
    flags = ("--load-balance-method", "round_robin") if isinstance(contender, Smg) and contender.picks_ranks else ()
    jobs = make_jobs(trace)
    with run_engines(size, *flags) as engines, run_router(contender, engines, size.time_scale) as router:
        send(router.url, make_jobs(_warm_up()), Load(size.time_scale, concurrency=2), lambda: None)
        pids = [*engines.pids, *router.pids]
        before = Usage.now(pids)
        outcomes, failed = send(router.url, jobs, load, on_done)
        machine, ours = Usage.now(pids).shares_since(before)
        prefill, decode = engines.account("prefill"), engines.account("decode")
    times = settled_times(outcomes, len(jobs))
    return Run(contender.name, seed, times, len(outcomes), failed, prefill, decode, machine, ours)


def settled_times(outcomes: Sequence[Outcome], requests: int) -> dict[str, float]:
    """Give mean, p50 and p99 of the times of those that did not meet an empty fleet, in milliseconds."""
    settled = [outcome for outcome in outcomes if outcome.number >= _SETTLING * requests]
    times = RunResult(settled, 0.0).summary() if settled else {}
    times.pop("wait", None)
    return times


def _warm_up() -> list[TraceRequest]:
    return [TraceRequest(0.0, (Segment((1 << 40) + number, 100),), 4) for number in range(_WARM_UP)]
