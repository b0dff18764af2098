"""Steps, queues and KV accounting of DP ranks, without servers or clocks."""

import itertools

import pytest

from dp_extproc.engine.scheduler.costs import Costs
from dp_extproc.engine.scheduler.group import Batch, Group
from dp_extproc.engine.scheduler.rank import Limits, Rank
from dp_extproc.engine.scheduler.snapshot import RankHistory
from dp_extproc.engine.scheduler.work import Output, Role, Stage, Work

COSTS = Costs(
    prefill_step=1.0,
    prefill_token=0.01,
    lockstep_share=0.75,
    decode_step=1.0,
    decode_request=0.1,
    decode_token=0.001,
)
LIMITS = Limits(capacity=1000, max_running=8, chunk=100, reserved=10)
_names = itertools.count()


def ranks(role: Role, count: int = 2, limits: Limits = LIMITS) -> list[Rank]:
    return [Rank(number, limits, role) for number in range(count)]


def work(prompt: int, output: int = 4, rank: int = 0) -> Work:
    return Work(f"w{next(_names)}", rank, prompt, output, room=1)


def add(rank: Rank, *works: Work, stage: Stage = Stage.WAITING) -> None:
    for each in works:
        rank.add(each, stage)


def run_step(group: Group) -> tuple[float, list[Output]]:
    """Run one step; 0 seconds when there was none."""
    step, at_once = group.begin(0.0)
    return (step.seconds if step else 0.0), at_once + group.finish()


class TestPrefill:
    def test_a_long_prompt_runs_in_chunks(self) -> None:
        """A rank computes at most its budget per step; the token comes with the last chunk."""
        (rank,) = ranks(Role.PREFILL, 1)
        prompt = work(250)
        add(rank, prompt)
        steps = [run_step(Group([rank], COSTS)) for _ in range(3)]

        assert [seconds for seconds, _ in steps] == [2.0, 2.0, 1.5]
        assert [bool(outputs) for _, outputs in steps] == [False, False, True]
        assert prompt.stage is Stage.INFLIGHT
        assert rank.uncached_tokens == 250

    def test_short_prompts_share_a_step(self) -> None:
        """What is left of the budget goes to the next in line."""
        (rank,) = ranks(Role.PREFILL, 1)
        prompts = [work(60), work(60), work(60)]
        add(rank, *prompts)
        run_step(Group([rank], COSTS))

        assert [each.prefilled for each in prompts] == [60, 40, 0]

    def test_without_chunks_the_batch_is_bounded(self) -> None:
        """A longer prompt than the bound runs alone, whole."""
        limits = Limits(capacity=1000, max_running=8, chunk=0, batch=100)
        (rank,) = ranks(Role.PREFILL, 1, limits)
        prompts = [work(60), work(60), work(500)]
        add(rank, *prompts)
        group = Group([rank], COSTS)
        finished = [[each for each in prompts if each.stage is Stage.INFLIGHT] for _ in range(3) if run_step(group)]

        assert [len(each) for each in finished] == [1, 2, 3]

    def test_a_step_costs_what_the_fullest_rank_costs(self) -> None:
        """Ranks with a common step all wait for it; the sum counts for the shared part."""
        group = Group(ranks(Role.PREFILL, 4), COSTS)
        add(group.ranks[0], work(80))
        alone, _ = run_step(group)
        for rank in group.ranks:
            add(rank, work(80))
        together, _ = run_step(group)

        assert alone == pytest.approx(1 + 0.01 * (0.75 * 80 + 0.25 * 20))
        assert together == pytest.approx(1 + 0.01 * 80)

    def test_nothing_starts_before_decode_has_answered(self) -> None:
        """The bootstrap queue holds no KV room and takes part in no step."""
        (rank,) = ranks(Role.PREFILL, 1)
        add(rank, work(80), stage=Stage.BOOTSTRAP)

        assert run_step(Group([rank], COSTS)) == (0.0, [])
        assert rank.used == 0

    def test_kv_room_is_held_until_the_transfer_is_over(self) -> None:
        """A full rank lets nobody in, first come first served."""
        (rank,) = ranks(Role.PREFILL, 1, Limits(capacity=100, max_running=8, chunk=1000))
        first, second, third = work(80), work(30), work(10)
        add(rank, first, second, third)
        group = Group([rank], COSTS)
        run_step(group)
        run_step(group)
        assert [first.stage, second.stage, third.stage] == [Stage.INFLIGHT, Stage.WAITING, Stage.WAITING]

        rank.transferred(first)
        run_step(group)
        assert [first.stage, second.stage, third.stage] == [Stage.DONE, Stage.INFLIGHT, Stage.INFLIGHT]
        assert rank.used == 40


class TestDecode:
    def test_kv_room_is_reserved_before_prefill_may_start(self) -> None:
        """The prealloc queue is served in order, with a reserve for everybody who was let in."""
        (rank,) = ranks(Role.DECODE, 1, Limits(capacity=100, max_running=8, chunk=0, reserved=10))
        first, second, third = work(60), work(35), work(5)
        add(rank, first, second, third, stage=Stage.PREALLOC)
        for each in (first, second, third):
            each.reachable = True

        assert rank.preallocate() == [first]
        assert [second.stage, third.stage] == [Stage.PREALLOC, Stage.PREALLOC]
        assert rank.used == 60
        rank.remove(first)
        assert rank.preallocate() == [second, third]

    def test_who_has_not_reached_prefill_blocks_nobody(self) -> None:
        """Others pass by."""
        (rank,) = ranks(Role.DECODE, 1)
        stuck, ready = work(10), work(10)
        add(rank, stuck, ready, stage=Stage.PREALLOC)
        ready.reachable = True

        assert rank.preallocate() == [ready]

    def test_the_first_token_comes_with_the_kv_cache(self) -> None:
        """A sequence that has arrived gives its first token before any step."""
        (rank,) = ranks(Role.DECODE, 1)
        arrived = work(10, output=3)
        add(rank, arrived)
        group = Group([rank], COSTS)
        step, at_once = group.begin(0.0)

        assert [(output.token, output.finished) for output in at_once] == [(0, False)]
        assert step is not None
        assert [output.token for output in group.finish()] == [1]
        assert rank.used == 12

    def test_the_batch_is_bounded(self) -> None:
        """Who is beyond max_running_requests waits for a place, also with its KV cache there."""
        (rank,) = ranks(Role.DECODE, 1, Limits(capacity=1000, max_running=2, chunk=0))
        add(rank, *(work(1, output=2) for _ in range(3)))
        group = Group([rank], COSTS)

        assert [len(run_step(group)[1]) for _ in range(3)] == [4, 2, 0]

    def test_a_step_grows_with_batch_and_context(self) -> None:
        """The largest batch and the longest context of any rank count, not those of one and the same."""
        group = Group(ranks(Role.DECODE), COSTS)
        add(group.ranks[0], *(work(1, 9) for _ in range(4)))
        add(group.ranks[1], work(300, 9))
        seconds, _ = run_step(group)

        assert seconds == pytest.approx(1 + 0.1 * 4 + 0.001 * 301)

    def test_the_newest_is_evicted_when_kv_room_runs_out(self) -> None:
        """Its client gets an error, and the others go on."""
        (rank,) = ranks(Role.DECODE, 1, Limits(capacity=21, max_running=8, chunk=0))
        old, new = work(9, 9), work(9, 9)
        add(rank, old, new)
        group = Group([rank], COSTS)
        outputs = [output for _ in range(2) for output in run_step(group)[1]]

        assert [output.work for output in outputs if output.error] == [new]
        assert old.stage is Stage.RUNNING
        assert rank.used == old.held == old.context


class TestUnified:
    def test_prefill_goes_first(self) -> None:
        """While there is a prompt to compute, the rank's running sequences pause."""
        (rank,) = ranks(Role.UNIFIED, 1)
        first, second = work(10, 5), work(150, 2)
        add(rank, first)
        group = Group([rank], COSTS)
        run_step(group)
        add(rank, second)
        generated = [(first.generated, second.generated) for _ in range(3) if run_step(group)]

        assert generated == [(1, 0), (1, 1), (2, 2)]

    def test_everything_is_freed_in_the_end(self) -> None:
        """No KV token is lost over many sequences of all sizes."""
        group = Group(ranks(Role.UNIFIED, 2), COSTS)
        works = [work(7 * number % 300 + 1, number % 9 + 1, number % 2) for number in range(100)]
        for each in works:
            add(group.ranks[each.dp_rank], each)
        outputs: list[Output] = []
        while not all(rank.is_empty for rank in group.ranks):
            outputs += run_step(group)[1]

        assert [rank.used for rank in group.ranks] == [0, 0]
        assert len(outputs) == sum(each.max_new_tokens for each in works)


class TestWhatIsPublished:
    def test_an_idle_rank_beside_a_busy_one_keeps_its_gauges(self) -> None:
        """Its snapshot follows every 15 steps, its gauges do not follow at all."""
        group = Group(ranks(Role.DECODE), COSTS)
        idle, busy = (RankHistory(rank, decode_log_interval=4) for rank in group.ranks)
        short, long = work(10, 6), work(10, 100)
        add(group.ranks[0], short)
        add(group.ranks[1], long)
        published = []
        for now in range(1, 21):
            steps(group, [idle, busy], float(now))
            assert idle.published is not None or now < 15
            published.append(idle.published_at)

        assert short.stage is Stage.DONE
        assert published[13:] == [0.0] + [15.0] * 6
        assert idle.published is not None
        assert idle.published.num_running_reqs == 0
        assert idle.gauges is not None
        assert (idle.gauges.num_running_reqs, idle.gauges_at) == (1, 4.0)
        assert busy.gauges_at == 20.0

    def test_gauges_freeze_under_back_pressure(self) -> None:
        """Queues that wait for the other side show in snapshots only."""
        (rank,) = ranks(Role.PREFILL, 1)
        history = RankHistory(rank)
        history.idle(100.0)
        add(rank, work(80), stage=Stage.BOOTSTRAP)
        history.idle(200.0)

        assert history.published is not None
        assert (history.published.queues["bootstrap"], history.published.num_total_tokens) == (1, 80)
        assert history.published.num_used_tokens == 0
        assert history.gauges is not None
        assert (history.gauges.queues["bootstrap"], history.gauges_at) == (0, 100.0)

    def test_an_idle_server_puts_its_gauges_right(self) -> None:
        """At once when they tell of running requests, else every 30 seconds."""
        (rank,) = ranks(Role.PREFILL, 1)
        history, group, prompt = RankHistory(rank), Group([rank], COSTS), work(80)
        add(rank, prompt)
        steps(group, [history], 1.0)
        assert history.gauges is not None
        assert (history.gauges.reported_running, history.gauges.num_used_tokens) == (1, 80)
        rank.transferred(prompt)
        reported = []
        for now in (2.0, 3.0, 31.9, 32.0):
            history.idle(now)
            reported.append(history.gauges_at)

        assert history.gauges.num_used_tokens == 0
        assert reported == [2.0, 2.0, 2.0, 32.0]

    def test_prefill_reported_nobody_as_running_before_0_5_17(self) -> None:
        """So nothing hurried an idle server to put its gauges right."""
        (rank,) = ranks(Role.PREFILL, 1)
        history, group, prompt = RankHistory(rank, reports_last_batch=False), Group([rank], COSTS), work(80)
        add(rank, prompt)
        steps(group, [history], 1.0)
        rank.transferred(prompt)
        history.idle(2.0)

        assert history.gauges is not None
        assert (history.gauges.reported_running, history.gauges.num_used_tokens) == (0, 80)

    def test_totals_count_what_is_promised(self) -> None:
        """On decode: used is what holds KV room, total adds who waits for some, active leaves out the transfer."""
        (rank,) = ranks(Role.DECODE, 1)
        moving, waiting = work(100), work(30)
        add(rank, moving, waiting, stage=Stage.PREALLOC)
        moving.reachable = True
        rank.preallocate()
        snapshot = RankHistory(rank).take()

        assert (snapshot.num_used_tokens, snapshot.num_total_tokens, snapshot.num_active_tokens) == (100, 130, 30)
        assert (snapshot.num_running_reqs, snapshot.num_waiting_reqs) == (0, 2)

    def test_decode_moments_let_one_fit_the_cost(self) -> None:
        """Sums over steps of batch size and time."""
        (rank,) = ranks(Role.DECODE, 1)
        history, group = RankHistory(rank), Group([rank], COSTS)
        add(rank, work(10, 3), work(10, 3))
        for now in (1.0, 2.0):
            steps(group, [history], now)
        count, batches, micros, *_, generated = history.take().decode_moments or ()

        assert (count, batches, generated) == (2, 4, 4)
        assert micros == pytest.approx(2 * (1 + 0.2) * 1e6 + (22 + 24) * 0.001 * 1e6)


def steps(group: Group, histories: list[RankHistory], now: float) -> None:
    """Run a step and let the ranks publish as the engine does."""
    step, _ = group.begin(now)
    batches = step.batches if step else (Batch.IDLE,) * len(histories)
    for history, batch in zip(histories, batches, strict=True):
        history.begin_step(batch)
    for history, batch in zip(histories, batches, strict=True):
        history.finish_step(batch, step.seconds if step else 0.0, now)
    group.finish()
    for history, batch in zip(histories, batches, strict=True):
        history.report_batch(batch, now)
