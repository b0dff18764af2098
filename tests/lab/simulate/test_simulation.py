"""The simulation keeps the stand-in's rules, loses no request, and is the same for the same seed."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from dp_extproc.config import HostPolicy, LoadSignal, PolicySettings, RankPolicy
from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.engine.scheduler.group import Group
from dp_extproc.lab.engine.scheduler.rank import Limits, Rank
from dp_extproc.lab.engine.scheduler.work import Role, Stage, Work
from dp_extproc.lab.simulate.decode import DecodeEngine
from dp_extproc.lab.simulate.fleet import Fleet, Surroundings
from dp_extproc.lab.simulate.outcome import Outcome, RunResult
from dp_extproc.lab.simulate.routers import Clairvoyant, EnginesOwn, Ours
from dp_extproc.lab.simulate.simulation import Placement, Simulation
from dp_extproc.lab.workload.generate import NAMES, make_trace
from dp_extproc.lab.workload.trace import Segment, TraceRequest

SMALL = Fleet(prefill=2, decode=2, ranks=4)


def request(prompt: int, output: int, arrival: float = 0.0) -> TraceRequest:
    return TraceRequest(arrival, (Segment(1, prompt),), output)


class Clock:
    """Run what is scheduled, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []

    def after(self, seconds: float, action: Callable[[float], None]) -> None:
        self._events.append((self.now + seconds, len(self._events), action))

    def run(self) -> None:
        while self._events:
            event = min(self._events, key=lambda event: event[:2])
            self._events.remove(event)
            self.now = event[0]
            event[2](self.now)


def step_by_step(requests: list[tuple[int, TraceRequest]], costs: Costs, ranks: int) -> dict[int, float]:
    """Decode with the stand-in's own classes. Returns when each request had its last token."""
    group = Group([Rank(rank, Limits(1 << 25, 1 << 20, 0), Role.DECODE) for rank in range(ranks)], costs)
    for number, (rank, each) in enumerate(requests):
        work = Work(str(number), rank, each.prompt_tokens, each.output_tokens)
        group.ranks[rank].add(work, Stage.WAITING)
        work.held = each.prompt_tokens
    now, ends = 0.0, {}
    while True:
        step, outputs = group.begin(now)
        for output in outputs:
            if output.finished:
                ends[int(output.work.rid)] = now
        if step is None:
            return ends
        now += step.seconds
        for output in group.finish():
            if output.finished:
                ends[int(output.work.rid)] = now


def test_decode_takes_the_times_of_the_stand_in() -> None:
    """Token by token there, a heap and two sums here: the last tokens come at the same moments."""
    fleet = Fleet(decode=1, ranks=3)
    requests = [(number % 3, request(100 * number + 5, 1 + 7 * number)) for number in range(20)]
    clock, ends = Clock(), {}
    server = DecodeEngine(
        fleet,
        1.0,
        clock.after,
        first_token=lambda _number, _now: None,
        finished=lambda number, now: ends.update({number: now}),
    )
    server.stepping = True  # so that all of them begin in the same step
    for number, (rank, each) in enumerate(requests):
        server.reserve(rank, each, 0.0, lambda _now: None)
        server.start(number, rank, each, 0.0)
    server._begin(0.0)
    clock.run()

    assert ends == pytest.approx(step_by_step(requests, fleet.costs, 3))
    assert (server.promised, server.context, server.sequences) == ([0] * 3,) * 3


def run(
    policy: PolicySettings | None = None,
    *,
    fleet: Fleet = SMALL,
    around: Surroundings | None = None,
    name: str = "azure",
    seed: int = 1,
    requests: int = 150,
    rate: float = 40.0,
    concurrency: int | None = None,
) -> RunResult:
    simulation = Simulation(fleet, around or Surroundings(), make_trace(name, requests, rate, seed), seed)
    router = EnginesOwn(simulation) if policy is None else Ours(simulation, policy, LoadSignal.ESTIMATE)
    return simulation.run(router, concurrency=concurrency)


@pytest.mark.parametrize("name", NAMES)
def test_every_request_ends_once_with_any_traffic(name: str) -> None:
    """No request is lost or counted twice."""
    result = run(
        PolicySettings(), name=name, fleet=Fleet(prefill=2, decode=2, ranks=4, prefix_cache=name == "sessions")
    )

    assert sorted(outcome.number for outcome in result.outcomes) == list(range(150))
    assert all(0 < outcome.first_token <= outcome.total for outcome in result.outcomes)


@pytest.mark.parametrize("rank", list(RankPolicy))
@pytest.mark.parametrize("host", list(HostPolicy))
def test_every_policy_runs(host: HostPolicy, rank: RankPolicy) -> None:
    """Each pair of policies runs with the service's own code."""
    assert len(run(PolicySettings(host=host, dp_rank=rank), requests=60).outcomes) == 60


@pytest.mark.parametrize(
    "around",
    [
        Surroundings(replicas=3),
        Surroundings(replicas=3, sync=0.05),
        Surroundings(error_sigma=1.0, bias=4.0, underrated=0.3),
        Surroundings(answers=False),
        Surroundings(scrapes=False),
        Surroundings(lying=True),
        Surroundings(direct_share=0.5),
        Surroundings(scrape_interval=0.1),
        Surroundings(scrape_interval=3.0, stale_after=2.0),
        Surroundings(stale_after=5.0, mute=0.5),
        Surroundings(aborts=0.5, patience=0.1),
        Surroundings(aborts=0.5, patience=0.1, replicas=3, sync=0.05),
    ],
    ids=[
        "blind",
        "sync",
        "errors",
        "no-answers",
        "no-scrapes",
        "lying",
        "direct",
        "often",
        "stale",
        "mute",
        "aborts",
        "aborts-sync",
    ],
)
def test_every_surrounding_runs(around: Surroundings) -> None:
    """Afterwards no replica has any reservation."""
    simulation = Simulation(SMALL, around, make_trace("azure", 150, 40.0, 1), 1)
    router = Ours(simulation, PolicySettings(), LoadSignal.ESTIMATE)
    result = simulation.run(router)
    simulation.settle()

    assert len(result.outcomes) == 150 - len(simulation._patience)
    assert {host.requests - others(host) for replica in router.replicas for host in replica.fleet.by_url.values()} == {
        0
    }
    assert not any(replica.attempts for replica in router.replicas)


@pytest.mark.parametrize(
    ("around", "bytes_per_token"),
    [
        pytest.param(Surroundings(bias=0.25), 1.0, id="taken for a quarter"),
        pytest.param(Surroundings(bias=2.0), 8.0, id="taken for twice as long"),
        pytest.param(Surroundings(bias=0.5, replicas=3, sync=0.02), 2.0, id="replicas that share"),
        pytest.param(Surroundings(replicas=3), 4.0, id="blind replicas"),
        pytest.param(Surroundings(direct_share=0.3), 4.0, id="direct traffic"),
    ],
)
def test_router_estimates_the_token_ratio(around: Surroundings, bytes_per_token: float) -> None:
    """It learns from what the engines count, but not from what they count for other routers."""
    simulation = Simulation(SMALL, around, make_trace("agent", 500, 6.5, 1), 1)
    router = Ours(simulation, PolicySettings(), LoadSignal.ESTIMATE)
    simulation.run(router)

    for replica in router.replicas:
        (ratio,) = replica.fleet.ratios.values()
        assert ratio.bytes_per_token == pytest.approx(bytes_per_token, rel=0.1)


def test_router_learns_the_token_ratio_of_dense_text_from_busy_engines() -> None:
    """Pages are of the end of a step, and have requests that later responses have shown to be computed: 1.3 bytes."""
    fleet, trace = Fleet(prefill=1, decode=1), make_trace("agent", 500, 7.5, 1)
    simulation = Simulation(fleet, Surroundings(bias=1.3 / 4.0), trace, 1)
    router = Ours(simulation, PolicySettings(), LoadSignal.ESTIMATE)
    simulation.run(router)
    (ratio,) = router.replicas[0].fleet.ratios.values()

    assert ratio.bytes_per_token == pytest.approx(1.3, rel=0.05)


LOOSE = Fleet(prefill=2, decode=2, ranks=4, lockstep=False)
"""Engines of four ranks that step alone."""


@pytest.mark.parametrize(
    "fleet",
    [
        LOOSE,
        replace(LOOSE, chunk=0),
        replace(LOOSE, prefill=0),
        replace(LOOSE, prefill=0, chunk=0),
        Fleet(prefill=0, decode=2, ranks=4),
        Fleet(prefill=4, decode=4, ranks=1),
    ],
    ids=["plain", "plain unchunked", "aggregated", "aggregated unchunked", "aggregated lockstep", "listeners"],
)
def test_ranks_that_step_alone_are_placed_like_with_exact_books(fleet: Fleet) -> None:
    """No request is lost, and the mean time to the first token is that of exact books or little more."""
    trace = make_trace("agent", 400, 7.0, 1)
    means = []
    for make in (Clairvoyant, lambda each: Ours(each, PolicySettings(), LoadSignal.ESTIMATE)):
        simulation = Simulation(fleet, Surroundings(), trace, 1)
        result = simulation.run(make(simulation))
        assert sorted(outcome.number for outcome in result.outcomes) == list(range(400))
        means.append(result.summary()["ttft_mean"])

    assert means[1] < 1.1 * means[0]


def test_clients_leave_aggregated_engines() -> None:
    """Nothing is left of them."""
    trace = make_trace("agent", 200, 8.0, 1)
    simulation = Simulation(replace(LOOSE, prefill=0), Surroundings(aborts=0.5, patience=0.1), trace, 1)
    router = Ours(simulation, PolicySettings(), LoadSignal.ESTIMATE)
    simulation.run(router)
    simulation.settle()

    assert not any(replica.attempts for replica in router.replicas)


def others(host: object) -> float:
    return sum(group.external_requests for group in host.groups)  # type: ignore[attr-defined]


def test_runs_are_equal_with_the_same_seed() -> None:
    """They are equal to the last digit; another seed gives another run."""
    assert run(PolicySettings()).summary() == run(PolicySettings()).summary() != run(PolicySettings(), seed=2).summary()


def test_closed_loop_keeps_one_request_in_flight() -> None:
    """Every request is alone: its prompt is one step, and it waits for no other."""
    result = run(fleet=Fleet(prefill=1, decode=1, ranks=1), concurrency=1, requests=20)
    costs = Fleet().costs
    (outcome,) = [outcome for outcome in result.outcomes if outcome.number == 0]
    prompt = make_trace("azure", 20, 40.0, 1)[0].prompt_tokens

    assert outcome.first_token == pytest.approx(
        0.004 + 4 * 0.001 + costs.prefill_seconds([prompt]) + costs.transfer_seconds(prompt)
    )


def test_clairvoyant_reads_the_true_queues() -> None:
    """Three requests of 4000 tokens are on one rank of the only engine; it picks the other one."""
    trace = [request(4000, 2, 0.0)] * 3 + [request(500, 2, 0.02)]
    simulation = Simulation(Fleet(prefill=1, decode=1, ranks=2), Surroundings(), trace, 1)
    clairvoyant = Clairvoyant(simulation)
    placed: list[Placement] = []

    class Stubborn(EnginesOwn):
        """Send the first three requests to rank 0."""

        def place(self, number: int, request: TraceRequest, now: float) -> Placement:
            placed.append(clairvoyant.place(number, request, now) if number == 3 else Placement(0, 0, 0, 0))
            return placed[-1]

    simulation.run(Stubborn(simulation))

    assert (placed[-1].prefill_rank, placed[-1].decode_rank) == (1, 1)


def test_policies_beat_random_placement() -> None:
    """With an uneven trace at high load and fixed seeds: a third less to the first token, in mean."""
    own = run(requests=600, name="agent", rate=6.5).summary()["ttft_mean"]
    ours = run(PolicySettings(), requests=600, name="agent", rate=6.5).summary()["ttft_mean"]

    assert ours < own * 2 / 3


def test_policies_keep_the_tpot_of_long_requests() -> None:
    """All requests get their tokens sooner than with the engines' own placement, the longest hardly later at worst.

    Many decode engines can keep short and long requests apart. That is best for the mean, as the short ones are many,
    but must not be at the cost of the long ones.
    """
    many = Fleet(prefill=8, decode=8, ranks=32)
    own = run(fleet=many, name="agent", requests=1500, rate=220.0).summary()
    ours = run(PolicySettings(), fleet=many, name="agent", requests=1500, rate=220.0).summary()
    change = {key: ours[key] / own[key] for key in ours}

    assert change["tpot_mean"] < 0.95
    assert change["tpot_short_mean"] < 0.95
    assert change["tpot_long_mean"] < 0.96
    assert change["tpot_longest_mean"] < 1.05


def outcome(number: int, tokens: int, milliseconds: float | None) -> Outcome:
    per_token = None if milliseconds is None else milliseconds / 1000
    return Outcome(number, first_token=1.0, per_token=per_token, total=2.0, tokens=tokens)


def test_summary_has_the_tpot_of_short_and_long_requests_apart() -> None:
    """Of twenty, the two with the most tokens are the longest; requests with one token of output are left out.

    The first one is the warm-up. Requests of the same length are ordered by their number, the same for every router.
    """
    short = [outcome(number, 100, 10.0) for number in range(10, 20)]
    long = [outcome(number, 100, 12.0) for number in range(20, 28)]
    longest = [outcome(28, 5000, 30.0), outcome(29, 4000, 20.0)]
    others = [outcome(0, 9000, 99.0), outcome(30, 9000, None)]
    summary = RunResult([*longest, *others, *long, *short], 0.0).summary()

    assert summary["tpot_short_mean"] == pytest.approx(10.0)
    assert summary["tpot_long_mean"] == pytest.approx((8 * 12 + 30 + 20) / 10)
    assert summary["tpot_longest_mean"] == pytest.approx(25.0)
    assert summary["tpot_mean"] == pytest.approx((10 * 10 + 8 * 12 + 30 + 20) / 20)


def test_summary_has_no_tpot_without_output() -> None:
    """Answers of a single token have no time per output token, whatever their length."""
    summary = RunResult([outcome(number, 100, None) for number in range(5)], 0.0).summary()

    assert not [key for key in summary if key.startswith("tpot")]
