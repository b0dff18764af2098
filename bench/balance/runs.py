"""Run one contender on one trace."""

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
"""Fraction of the requests at the start that is excluded from the times, because they meet an empty fleet."""


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a run."""

    contender: str
    seed: int
    times: dict[str, float]
    """Milliseconds: mean, p50 and p99 of ``ttft``, ``tpot`` and ``e2e``, without the first fifth of the requests."""
    answered: int
    failed: Sequence[Failed]
    prefill: Account
    decode: Account
    machine: float
    """Fraction of the processors' time that was not idle."""
    ours: float
    """The part of ``machine`` that client, router and engines used. Other programs used the rest."""

    def numbers(self) -> dict[str, float]:
        """Return the numbers of a table."""
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
        """Return the whole run, with the first five of its failures."""
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
    """Start engines and the contender's router, send the trace, read the engines, stop everything."""
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
    """Return mean, p50 and p99 of the times of requests that did not meet an empty fleet, in milliseconds."""
    settled = [outcome for outcome in outcomes if outcome.number >= _SETTLING * requests]
    times = RunResult(settled, 0.0).summary() if settled else {}
    times.pop("wait", None)
    return times


def _warm_up() -> list[TraceRequest]:
    return [TraceRequest(0.0, (Segment((1 << 40) + number, 100),), 4) for number in range(_WARM_UP)]
