"""Test steps, queues and KV accounting of DP ranks, without processes or clocks."""

import itertools

import pytest

from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.engine.scheduler.group import Batch, Group
from dp_extproc.lab.engine.scheduler.hit_rate import HitRate
from dp_extproc.lab.engine.scheduler.prefix_cache import prompt_of
from dp_extproc.lab.engine.scheduler.rank import Limits, Rank
from dp_extproc.lab.engine.scheduler.snapshot import RankHistory
from dp_extproc.lab.engine.scheduler.work import Output, Role, Stage, Work

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


def known(prompt: int, output: int = 4, topic: int = 0, shared: int = 10_000) -> Work:
    """Make a sequence for the prefix cache: *shared* tokens like every other, then those of its topic."""
    begin = min(prompt, shared)
    parts = prompt_of([(0, begin), (topic + 1, prompt - begin)])
    return Work(f"w{next(_names)}", 0, prompt, output, room=1, prompt=parts)


def add(rank: Rank, *works: Work, stage: Stage = Stage.WAITING) -> None:
    for each in works:
        rank.add(each, stage)


def run_step(group: Group) -> tuple[float, list[Output]]:
    """Run one step; 0 seconds when there was none."""
    step, at_once = group.begin(0.0)
    return (step.seconds if step else 0.0), at_once + group.finish()


class TestPrefill:
    def test_long_prompt_runs_in_chunks(self) -> None:
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
        """The rest of the budget goes to the next prompt in the queue."""
        (rank,) = ranks(Role.PREFILL, 1)
        prompts = [work(60), work(60), work(60)]
        add(rank, *prompts)
        run_step(Group([rank], COSTS))

        assert [each.prefilled for each in prompts] == [60, 40, 0]

    def test_batch_is_bounded_without_chunks(self) -> None:
        """A longer prompt than the bound runs alone, whole."""
        limits = Limits(capacity=1000, max_running=8, chunk=0, batch=100)
        (rank,) = ranks(Role.PREFILL, 1, limits)
        prompts = [work(60), work(60), work(500)]
        add(rank, *prompts)
        group = Group([rank], COSTS)
        finished = [[each for each in prompts if each.stage is Stage.INFLIGHT] for _ in range(3) if run_step(group)]

        assert [len(each) for each in finished] == [1, 2, 3]

    def test_step_costs_what_the_fullest_rank_costs(self) -> None:
        """Ranks with a common step all wait for it; the sum counts for the shared part."""
        group = Group(ranks(Role.PREFILL, 4), COSTS)
        add(group.ranks[0], work(80))
        alone, _ = run_step(group)
        for rank in group.ranks:
            add(rank, work(80))
        together, _ = run_step(group)

        assert alone == pytest.approx(1 + 0.01 * (0.75 * 80 + 0.25 * 20))
        assert together == pytest.approx(1 + 0.01 * 80)

    def test_waits_for_the_fullest_rank_are_counted(self) -> None:
        """One of four ranks works: three quarters of the step are waited. If all work alike, none waits."""
        group = Group(ranks(Role.PREFILL, 4), COSTS)
        add(group.ranks[0], work(80))
        alone, _ = run_step(group)
        assert group.waited == pytest.approx(0.75 * alone)
        for rank in group.ranks:
            add(rank, work(80))
        together, _ = run_step(group)

        assert group.waited == pytest.approx(0.75 * alone)
        assert group.steps == 2
        assert group.seconds == pytest.approx(alone + together)

    def test_prefill_waits_until_decode_has_answered(self) -> None:
        """The bootstrap queue holds no KV room and takes part in no step."""
        (rank,) = ranks(Role.PREFILL, 1)
        add(rank, work(80), stage=Stage.BOOTSTRAP)

        assert run_step(Group([rank], COSTS)) == (0.0, [])
        assert rank.used == 0

    def test_kv_room_is_held_until_the_transfer_is_over(self) -> None:
        """A full rank admits no sequence, first come first served."""
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
        """The prealloc queue is served in order, with a reserve for each accepted sequence."""
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

    def test_sequence_without_contact_to_prefill_blocks_no_other(self) -> None:
        """Others pass it."""
        (rank,) = ranks(Role.DECODE, 1)
        stuck, ready = work(10), work(10)
        add(rank, stuck, ready, stage=Stage.PREALLOC)
        ready.reachable = True

        assert rank.preallocate() == [ready]

    def test_first_token_comes_with_the_kv_cache(self) -> None:
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

    def test_batch_is_bounded_by_running_requests(self) -> None:
        """A sequence beyond max_running_requests waits, also with its KV cache there."""
        (rank,) = ranks(Role.DECODE, 1, Limits(capacity=1000, max_running=2, chunk=0))
        add(rank, *(work(1, output=2) for _ in range(3)))
        group = Group([rank], COSTS)

        assert [len(run_step(group)[1]) for _ in range(3)] == [4, 2, 0]

    def test_step_grows_with_batch_and_context(self) -> None:
        """The largest batch and the longest context of any rank count, not those of one and the same."""
        group = Group(ranks(Role.DECODE), COSTS)
        add(group.ranks[0], *(work(1, 9) for _ in range(4)))
        add(group.ranks[1], work(300, 9))
        seconds, _ = run_step(group)

        assert seconds == pytest.approx(1 + 0.1 * 4 + 0.001 * 301)

    def test_newest_sequence_is_evicted_without_kv_room(self) -> None:
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
    def test_prefill_has_priority_over_decode(self) -> None:
        """While there is a prompt to compute, the rank's running sequences pause."""
        (rank,) = ranks(Role.UNIFIED, 1)
        first, second = work(10, 5), work(150, 2)
        add(rank, first)
        group = Group([rank], COSTS)
        run_step(group)
        add(rank, second)
        generated = [(first.generated, second.generated) for _ in range(3) if run_step(group)]

        assert generated == [(1, 0), (1, 1), (2, 2)]

    def test_everything_is_freed_at_the_end(self) -> None:
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


class TestPrefixCache:
    def test_prompt_is_computed_once(self) -> None:
        """The second time only its last token is, and the step costs accordingly."""
        (rank,) = ranks(Role.PREFILL, 1)
        first, second = known(80), known(80)
        group = Group([rank], COSTS)
        add(rank, first)
        run_step(group)
        add(rank, second)
        seconds, _ = run_step(group)

        assert (first.cached_tokens, second.cached_tokens, second.prefilled) == (0, 79, 80)
        assert seconds == pytest.approx(1 + 0.01)
        assert (rank.uncached_tokens, rank.cached_tokens) == (81, 79)

    def test_only_the_common_prefix_is_shared(self) -> None:
        """It is shared token by token, with pages of one token."""
        (rank,) = ranks(Role.PREFILL, 1)
        first, second = known(80, topic=1, shared=33), known(70, topic=2, shared=33)
        group = Group([rank], COSTS)
        add(rank, first)
        run_step(group)
        add(rank, second)
        run_step(group)

        assert second.cached_tokens == 33

    def test_every_chunk_is_cached_for_the_next_prompt(self) -> None:
        """A prompt behind a long one finds what has been computed of it so far, and computes the rest itself."""
        (rank,) = ranks(Role.PREFILL, 1)
        first, second = known(250), known(250)
        add(rank, first, second)
        group = Group([rank], COSTS)
        for _ in range(3):
            run_step(group)

        assert first.stage is second.stage is Stage.INFLIGHT
        assert (first.cached_tokens, second.cached_tokens, rank.uncached_tokens) == (0, 200, 300)
        assert rank.used == 250

    def test_prompts_of_one_step_do_not_share(self) -> None:
        """Both compute the prompt; from then on it is there once, locked by both."""
        (rank,) = ranks(Role.PREFILL, 1)
        first, second = known(40), known(40)
        add(rank, first, second)
        step, _ = Group([rank], COSTS).begin(0.0)
        assert step is not None
        assert rank.used == 80
        rank.finish_prefill()

        assert (rank.used, rank.cache.size, rank.uncached_tokens) == (40, 40, 80)
        rank.transferred(first)
        assert (rank.used, rank.cache.evictable) == (40, 0)
        rank.transferred(second)
        assert (rank.used, rank.cache.evictable) == (0, 40)

    def test_cached_prompts_make_room(self) -> None:
        """Unlocked prompts count as free, and the least recently used is evicted when the room is needed."""
        (rank,) = ranks(Role.PREFILL, 1, Limits(capacity=100, max_running=8, chunk=1000))
        group = Group([rank], COSTS)
        old, used_again, new = (known(40, topic=topic, shared=0) for topic in (1, 2, 3))
        for each in (used_again, old, known(40, topic=2, shared=0), new):
            add(rank, each)
            run_step(group)
            rank.transferred(each)

        assert rank.cache.size == 80
        found = {topic: rank.cache.match(known(40, topic=topic, shared=0).prompt, 40).end for topic in (1, 2, 3)}
        assert found == {1: 0, 2: 40, 3: 40}

    def test_cached_tokens_need_no_room(self) -> None:
        """A prompt with a cached prefix is admitted where another of its length is not."""
        (rank,) = ranks(Role.PREFILL, 1, Limits(capacity=100, max_running=8, chunk=1000))
        group = Group([rank], COSTS)
        first, stranger, second = known(80), known(80, topic=1, shared=0), known(90)
        add(rank, first)
        run_step(group)
        add(rank, stranger)
        assert run_step(group) == (0.0, [])
        assert rank.used == rank.cache.locked == 80
        rank.remove(stranger)
        add(rank, second)
        run_step(group)

        assert (second.stage, rank.used) == (Stage.INFLIGHT, 90)

    def test_aborted_prompt_leaves_its_chunks(self) -> None:
        """What had been computed of it stays for others."""
        (rank,) = ranks(Role.PREFILL, 1)
        aborted = known(250)
        add(rank, aborted)
        run_step(Group([rank], COSTS))
        rank.remove(aborted)

        assert (rank.used, rank.cache.evictable, aborted.prompt) == (0, 100, b"")

    def test_answers_evict_cached_prompts(self) -> None:
        """A unified rank whose sequences grow evicts cached prompts before it evicts a sequence."""
        (rank,) = ranks(Role.UNIFIED, 1, Limits(capacity=30, max_running=8, chunk=100, reserved=0))
        group = Group([rank], COSTS)
        add(rank, known(20, output=1, topic=1, shared=0))
        run_step(group)
        assert rank.cache.evictable == 20
        growing = known(9, output=20, topic=2, shared=0)
        add(rank, growing)
        outputs = [output for _ in range(20) for output in run_step(group)[1]]

        assert [output.error for output in outputs] == [None] * 20
        assert (rank.used, rank.cache.size) == (0, 9)

    def test_sequence_without_a_prompt_is_not_cached(self) -> None:
        """That is how the cache is switched off: for an engine, or for a simulation that has lengths only."""
        (rank,) = ranks(Role.PREFILL, 1)
        group = Group([rank], COSTS)
        for each in (work(80), work(80)):
            add(rank, each)
            run_step(group)
            rank.transferred(each)

        assert (rank.uncached_tokens, rank.cache.size, rank.used) == (160, 0, 0)

    def test_everything_is_unlocked_at_the_end(self) -> None:
        """Many prompts with common prefixes under pressure: the room is never exceeded, and nothing stays locked."""
        (rank,) = ranks(Role.UNIFIED, 1, Limits(capacity=400, max_running=8, chunk=64, reserved=4))
        works = [known(7 * number % 300 + 1, number % 9 + 1, number % 4, shared=number % 90) for number in range(200)]
        add(rank, *works)
        group, outputs = Group([rank], COSTS), list[Output]()
        while not rank.is_empty:
            outputs += run_step(group)[1]
            assert rank.held + rank.cache.size <= 400

        assert (rank.used, rank.held, rank.cache.locked) == (0, 0, 0)
        assert rank.uncached_tokens + rank.cached_tokens == sum(each.prompt_tokens for each in works)
        assert rank.cached_tokens > 1000


class TestWhatIsPublished:
    def test_idle_rank_beside_a_busy_one_keeps_its_gauges(self) -> None:
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
        """Queues that wait for the other side are in snapshots only."""
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

    def test_idle_engine_corrects_its_gauges(self) -> None:
        """It does so at once when they report running requests, else every 30 seconds."""
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

    def test_prefill_reported_no_running_request_before_0_5_17(self) -> None:
        """So an idle engine had no cause to correct its gauges at once."""
        (rank,) = ranks(Role.PREFILL, 1)
        history, group, prompt = RankHistory(rank, reports_last_batch=False), Group([rank], COSTS), work(80)
        add(rank, prompt)
        steps(group, [history], 1.0)
        rank.transferred(prompt)
        history.idle(2.0)

        assert history.gauges is not None
        assert (history.gauges.reported_running, history.gauges.num_used_tokens) == (0, 80)

    def test_totals_count_what_is_reserved(self) -> None:
        """On decode: used is what holds KV room, total adds what waits for some, active leaves out the transfer."""
        (rank,) = ranks(Role.DECODE, 1)
        moving, waiting = work(100), work(30)
        add(rank, moving, waiting, stage=Stage.PREALLOC)
        moving.reachable = True
        rank.preallocate()
        snapshot = RankHistory(rank).take()

        assert (snapshot.num_used_tokens, snapshot.num_total_tokens, snapshot.num_active_tokens) == (100, 130, 30)
        assert (snapshot.num_running_reqs, snapshot.num_waiting_reqs) == (0, 2)

    def test_decode_moments_are_sums_over_steps(self) -> None:
        """They are sums of batch size and time, enough to fit the cost."""
        (rank,) = ranks(Role.DECODE, 1)
        history, group = RankHistory(rank), Group([rank], COSTS)
        add(rank, work(10, 3), work(10, 3))
        for now in (1.0, 2.0):
            steps(group, [history], now)
        count, batches, micros, *_, generated = history.take().decode_moments or ()

        assert (count, batches, generated) == (2, 4, 4)
        assert micros == pytest.approx(2 * (1 + 0.2) * 1e6 + (22 + 24) * 0.001 * 1e6)

    def test_waiting_tokens_are_discounted_by_the_recent_hit_rate(self) -> None:
        """With its default policy SGLang does not look up what they will find."""
        (rank,) = ranks(Role.PREFILL, 1)
        history, group = RankHistory(rank), Group([rank], COSTS)
        add(rank, known(90))
        steps(group, [history], 1.0)
        add(rank, known(100))
        steps(group, [history], 2.0)
        add(rank, known(90), known(11, topic=1, shared=0))
        waiting = history.take()

        assert waiting.cache_hit_rate == 0.9
        assert waiting.num_waiting_uncached_tokens == int(90 * (1 - 90 / 190)) + int(11 * (1 - 90 / 190))
        assert (waiting.num_used_tokens, waiting.num_total_tokens, waiting.kv_evictable_tokens) == (100, 201, 0)

    def test_recent_hit_rate_expires(self) -> None:
        """It does so after 15 seconds, at the next batch; until 0.5.18 all waiting tokens were reported."""
        rate = HitRate()
        rate.add(0, 100, 0.0)
        rate.add(90, 10, 14.9)
        assert (rate.last, rate.recent) == (0.9, 0.45)
        rate.add(50, 50, 15.0)
        assert (rate.last, rate.recent) == (0.5, 0.7)
        (rank,) = ranks(Role.PREFILL, 1)
        history, group = RankHistory(rank, estimates_hits=False), Group([rank], COSTS)
        for now in (1.0, 2.0):
            add(rank, known(90))
            steps(group, [history], now)
        add(rank, known(50))

        assert history.take().num_waiting_uncached_tokens == 50

    def test_output_rate_is_over_its_own_reports(self) -> None:
        """It is the tokens of 4 own steps over the time between two reports, idle times included; 0 at rest."""
        (rank,) = ranks(Role.DECODE, 1)
        history, group = RankHistory(rank, decode_log_interval=4, counted_since=10.0), Group([rank], COSTS)
        add(rank, work(10, 13), work(10, 13))
        rates = []
        for now in (11, 12, 13, 14, 15, 16, 17, 18, 35, 36, 37, 38):
            steps(group, [history], float(now))
            rates.append(history.take().gen_throughput)
        assert rates == [0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 0.4]
        assert rank.is_empty
        history.idle(39.0)

        assert history.take().gen_throughput == 0

    def test_rates_need_metrics(self) -> None:
        """SGLang computes them for its collector only, so /v1/loads has none either."""
        (rank,) = ranks(Role.UNIFIED, 1)
        history, group = RankHistory(rank, decode_log_interval=1, keeps_statistics=False), Group([rank], COSTS)
        for now in (1.0, 2.0, 3.0):
            add(rank, known(50))
            steps(group, [history], now)
        seen = history.take()

        assert (seen.gen_throughput, seen.cache_hit_rate) == (0, 0)


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
