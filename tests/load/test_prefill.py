"""Prefill ranks count the tokens that have not started; responses of prefill legs move them forward."""

from typing import Any

import pytest

from dp_extproc.engines.model import RankSample
from dp_extproc.load.prefill import ARRIVAL_LAG, PrefillGroup
from fleet_fixtures import absorb_sample

NOW = 1000.0
LATER = NOW + 2 * ARRIVAL_LAG


def make_group(ranks: int = 2, budget: float = 1000, *, chunked: bool = True) -> PrefillGroup:
    return PrefillGroup(range(ranks), budget=budget, chunked=chunked, step_cost=400)


def test_a_request_to_an_idle_engine_starts_at_once() -> None:
    """It is in the running step, which weighs a quarter; a second one waits for the next step and weighs all."""
    group = make_group()
    group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(800, NOW)

    assert group.loads == [200, 800]


def test_a_response_ends_the_step_of_every_rank() -> None:
    """When rank 0 responds, what waits on rank 1 and had arrived by then has started."""
    group = make_group()
    first = group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(800, NOW)
    first.complete(LATER)

    assert group.loads == [0, 200]


def test_a_request_that_has_not_arrived_does_not_start() -> None:
    """The step that has just begun could not take in a request that is still being tokenized."""
    group = make_group()
    first = group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(800, NOW)
    group.ranks[1].reserve(60, LATER - ARRIVAL_LAG / 2)
    first.complete(LATER)

    assert group.loads == [0, 200 + 60]


def test_an_engine_without_other_work_starts_a_request_on_its_way() -> None:
    """Without older requests the engine starts what arrives."""
    group = make_group()
    first = group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(60, LATER - ARRIVAL_LAG / 2)
    first.complete(LATER)

    assert group.loads == [0, 15]


def test_two_responses_of_one_step_end_it_once() -> None:
    """Both requests ran in the step that ended; the second response changes nothing."""
    group = make_group(3)
    runs = group.ranks[0].reserve(500, NOW)
    also = group.ranks[1].reserve(500, NOW)
    runs.complete(LATER)  # now the second one runs
    group.ranks[2].reserve(2500, LATER)
    third = group.ranks[0].reserve(500, LATER)
    also.complete(LATER + 1)
    loads = list(group.loads)
    third.complete(LATER + 1.01)

    assert loads == [125, 0, 1500 + 250]
    assert group.loads == [0, 0, 500 + 250]  # a third step: the answer came from the running one


def test_a_response_to_a_computed_request_ends_no_step() -> None:
    """Its KV cache was still on its way; the step that it ran in had ended before."""
    group = make_group(2)
    runs = group.ranks[0].reserve(500, NOW)
    one, two = (group.ranks[1].reserve(400, NOW) for _ in range(2))
    runs.complete(LATER)  # both of rank 1 run now, 800 of 1000
    group.ranks[0].reserve(3000, LATER)
    one.complete(LATER + 1)
    loads = list(group.loads)
    two.complete(LATER + 1.01)

    assert loads == [2000 + 250, 0]
    assert group.loads == loads


def test_a_long_prompt_runs_chunk_by_chunk() -> None:
    """With 1000 tokens per rank and step, 2500 take three steps; what is left waits."""
    group = make_group(2)
    group.ranks[0].reserve(2500, NOW)
    loads = [list(group.loads)]
    for step in range(1, 4):
        other = group.ranks[1].reserve(10, NOW + step - 0.5)
        group.ranks[1].reserve(10, NOW + step - 0.5)
        other.complete(NOW + step)
        loads.append(list(group.loads))

    assert [load[0] for load in loads] == [1500 + 250, 500 + 250, 125, 0]


def test_without_chunks_a_long_prompt_runs_alone_in_one_step() -> None:
    """It takes the whole step, however long; short ones share one up to the budget."""
    group = make_group(1, chunked=False)
    first = group.ranks[0].reserve(100, NOW)
    long = group.ranks[0].reserve(5000, NOW)
    group.ranks[0].reserve(600, NOW)
    group.ranks[0].reserve(600, NOW)
    first.complete(LATER)
    alone = list(group.loads)
    long.complete(LATER + 1)

    assert alone == [1250 + 1200]
    assert group.loads == [150 + 600]


def test_a_response_out_of_turn_completes_those_before_it() -> None:
    """Ranks work first in, first out: the next event makes up for a lost one."""
    group = make_group(1)
    group.ranks[0].reserve(900, NOW)
    group.ranks[0].reserve(900, NOW)
    last = group.ranks[0].reserve(900, NOW)
    last.complete(LATER)

    assert group.loads == [0]


class TestCancelled:
    """Clients leave and legs fail, which is no evidence of steps."""

    def test_a_cancelled_request_moves_no_other(self) -> None:
        """Of ten requests of 4000 tokens the newest is cancelled: nine are left."""
        group = make_group(1)
        first, *_, newest = [group.ranks[0].reserve(4000, NOW) for _ in range(10)]
        newest.cancel(LATER)
        after = list(group.loads)
        first.cancel(LATER)

        assert after == [3000 + 250 + 8 * 4000]
        assert group.loads == [7 * 4000 + 3000 + 250]  # the next one starts, as nothing else runs

    def test_the_running_step_goes_on_after_a_cancelled_request(self) -> None:
        """What waits on the other ranks still waits for the rest of the step."""
        group = make_group(3)
        one = group.ranks[0].reserve(500, NOW)
        two = group.ranks[1].reserve(800, NOW)
        group.ranks[2].reserve(600, NOW)
        one.complete(LATER)  # both external run now
        group.ranks[0].reserve(900, LATER)
        two.cancel(LATER + 1)

        assert group.loads == [900, 0, 150]

    def test_a_cancelled_request_does_not_postpone_overdue_ones(self) -> None:
        """Clients that leave do not keep old requests in the load."""
        group = make_group(2)
        group.ranks[0].reserve(800, NOW)
        cancelled = group.ranks[1].reserve(1000, NOW)
        group.ranks[1].reserve(1000, NOW)
        cancelled.cancel(NOW + 0.9)
        group.refresh(NOW + 1)

        assert group.loads == [200, 250]

    def test_a_computed_request_is_not_taken_off_twice(self) -> None:
        """A later response of its rank has completed it; then its own end comes without a response."""
        group = make_group(1)
        silent, answered = (group.ranks[0].reserve(400, NOW) for _ in range(2))
        answered.complete(LATER)
        silent.cancel(LATER + 1)

        assert group.loads == [0]
        assert group.requests == 0


class TestStepsWithoutAResponse:
    """A step that has only parts of long prompts ends without a response; its measured time counts."""

    @staticmethod
    def measured(ranks: int = 1) -> PrefillGroup:
        """Return an idle group whose steps of 1000 tokens take 1.4 seconds, fixed costs included."""
        group = make_group(ranks)
        group.ranks[0].reserve(1000, NOW - 10).complete(NOW - 10 + 1.4)
        return group

    @pytest.mark.parametrize(("seconds", "left"), [(1.3, 3000 + 250), (1.5, 2000 + 250), (2.9, 1000 + 250)])
    def test_the_parts_of_a_long_prompt_start_one_after_the_other(self, seconds: float, left: float) -> None:
        """Of 4000 tokens on a rank, the next 1000 start every 1.4 seconds."""
        group = self.measured()
        group.ranks[0].reserve(4000, NOW)
        group.survey(NOW + seconds)

        assert group.loads == [left]

    def test_the_last_part_ends_by_its_response(self) -> None:
        """However late it is: the engine may be slower than before."""
        group = self.measured()
        group.ranks[0].reserve(2000, NOW)
        group.ranks[0].reserve(500, NOW)
        group.survey(NOW + 6)

        assert group.loads == [250 + 500]

    def test_a_step_that_completes_a_request_ends_by_its_response(self) -> None:
        """Rank 1 has a short prompt in the same step, so that a response comes."""
        group = self.measured(2)
        group.ranks[0].reserve(900, NOW).complete(NOW + 1.3)
        group.ranks[0].reserve(500, NOW + 2)
        for rank, tokens in ((0, 4000), (1, 700)):
            group.ranks[rank].reserve(tokens, NOW + 2)
        group.survey(NOW + 2.9)

        assert group.loads == [125 + 4000, 700]


class TestWithoutEvents:
    """Events may be missing, so that time alone moves the load."""

    def test_waiting_requests_count_as_started_after_a_second(self) -> None:
        """1000 waiting tokens weigh 250 then."""
        group = make_group(2)
        group.ranks[0].reserve(800, NOW)
        group.ranks[1].reserve(1000, NOW)
        assert group.due == NOW + 1
        group.refresh(NOW + 1)

        assert group.loads == [200, 250]

    def test_no_more_than_a_step_counts_as_started(self) -> None:
        """Of three requests of 800 tokens 1400 tokens wait, however long the silence is."""
        group = make_group(2)
        first = group.ranks[0].reserve(300, NOW)
        for _ in range(3):
            group.ranks[1].reserve(800, NOW + 0.5)
        for seconds in (1.5, 1.75, 3):
            group.refresh(NOW + seconds)
        waiting = group.loads[1]
        first.complete(NOW + 3.5)

        assert waiting == 250 + 1400
        assert group.loads[1] == 250 + 400

    def test_a_response_after_a_silence_leaves_the_long_prompts_of_other_ranks(self) -> None:
        """Rank 2 computes 16,000 tokens in chunks, while rank 5 has done a part of its 73,376: 44,704 are left."""
        group = make_group(8, budget=4096)
        answered = group.ranks[2].reserve(16_000, NOW)
        for tokens in (40_000, 33_376):
            group.ranks[5].reserve(tokens, NOW)
        for seconds in (1, 2, 3):
            group.refresh(NOW + seconds)
        answered.complete(NOW + 3.1)

        assert group.loads[2] == 0
        assert group.loads[5] >= 44_704

    @pytest.mark.parametrize(("seconds", "left"), [(7.9, 5250.0), (8.0, 0.0)])
    def test_very_old_requests_count_as_computed(self, seconds: float, left: float) -> None:
        """6000 tokens are gone after eight seconds."""
        group = make_group(1)
        group.ranks[0].reserve(6000, NOW)
        group.refresh(NOW + seconds)

        assert group.loads == [left]

    def test_events_postpone_both(self) -> None:
        """While responses come in, a long queue is a long queue."""
        group = make_group(2)
        first = group.ranks[0].reserve(800, NOW)
        for _ in range(3):
            group.ranks[1].reserve(1000, NOW)
        first.complete(NOW + 1.5)
        group.refresh(NOW + 2)

        assert group.loads == [0, 2000 + 250]

    def test_requests_behind_a_long_prompt_are_given_its_time(self) -> None:
        """Without chunks 120,000 tokens are one step of many seconds, for the other rank, too."""
        group = make_group(2, chunked=False)
        group.ranks[0].reserve(120_000, NOW)
        for _ in range(20):
            group.ranks[0].reserve(300, NOW)
        group.ranks[1].reserve(300, NOW)
        group.refresh(NOW + 15)

        assert group.loads == [30_000 + 20 * 300, 300]

    def test_a_long_prompt_without_an_event_counts_as_computed_in_the_end(self) -> None:
        """At 6000 tokens per second, four times over: 84 s for the first, a little more for those behind it."""
        group = make_group(1, chunked=False)
        group.ranks[0].reserve(120_000, NOW)
        for _ in range(20):
            group.ranks[0].reserve(300, NOW)
        group.refresh(NOW + 83)
        before = group.loads[0]
        group.refresh(NOW + 84)
        without = group.loads[0]
        group.refresh(NOW + 90)

        assert before > 30_000
        assert without == 20 * 300 - 0.75 * 900
        assert group.loads == [0]

    def test_a_slow_engine_is_given_more_time(self) -> None:
        """A step of 1000 tokens took 4.2 s, so that the next one may, too."""
        group = make_group(1)
        first = group.ranks[0].reserve(1000, NOW)
        for _ in range(3):
            group.ranks[0].reserve(1000, NOW)
        first.complete(NOW + 4.2)
        group.refresh(NOW + 9)

        assert group.loads == [250 + 2000]

    def test_steps_without_a_response_make_no_engine_slow(self) -> None:
        """Ten chunks of a long prompt took a second each: what follows is overdue after a few."""
        group = make_group(1)
        long = group.ranks[0].reserve(10_000, NOW)
        group.ranks[0].reserve(400, NOW)
        group.ranks[0].reserve(400, NOW + 10)
        long.complete(NOW + 10)
        before = list(group.loads)
        group.refresh(NOW + 10 + 3)

        assert before == [100 + 400]
        assert group.loads == [100 + 100]

    def test_a_late_event_of_an_overdue_request_changes_nothing(self) -> None:
        """It is completed like any other, and the load of the external stays."""
        group = make_group(1)
        late = group.ranks[0].reserve(100, NOW)
        group.refresh(NOW + 60)
        group.ranks[0].reserve(70, NOW + 60)
        late.complete(NOW + 61)

        assert group.loads == [17.5]
        assert group.requests == 1


def sample(group: PrefillGroup, at: float, used_tokens: int = 0, **fields: Any) -> None:
    absorb_sample(group, RankSample(0, used_tokens, **fields), at)


class TestExternal:
    """What samples have beyond the reservations is external."""

    @pytest.mark.parametrize(
        ("fields", "external"),
        [
            ({"waiting_uncached_tokens": 900, "total_tokens": 5000, "used_tokens": 4000}, 600),
            ({"total_tokens": 5000, "used_tokens": 4000}, 700),
            ({"used_tokens": 4000}, 3700),
        ],
        ids=["0.5.13", "0.5.11", "older"],
    )
    def test_the_most_exact_field_of_a_sample_counts(self, fields: dict[str, int], external: float) -> None:
        """Tokens to be computed, else queued tokens, else tokens in use; 300 of them are reserved."""
        group = make_group(1)
        group.ranks[0].reserve(300, NOW)
        sample(group, NOW + 1, waiting_requests=3, **fields)

        assert group.external == [external]
        assert group.loads == [external + 75]

    def test_a_computed_prompt_explains_no_waiting_tokens(self) -> None:
        """A later sample cannot have it among the tokens that wait."""
        group = make_group(1)
        group.ranks[0].reserve(300, NOW).complete(NOW + 1)
        sample(group, NOW + 2, waiting_uncached_tokens=300, waiting_requests=1)

        assert group.loads == [300]

    def test_more_tokens_without_more_requests_are_not_external(self) -> None:
        """A prompt is longer than estimated; the difference ends with its request."""
        group = make_group(1)
        group.ranks[0].reserve(300, NOW)
        sample(group, NOW + 1, waiting_uncached_tokens=1200, waiting_requests=1)

        assert group.external == [0]

    def test_old_requests_expire_when_the_engine_is_empty(self) -> None:
        """Without an event they end once the engine reports no request at all."""
        group = make_group(1)
        group.ranks[0].reserve(300, NOW)
        group.ranks[0].reserve(300, NOW + 20)
        sample(group, NOW + 21)

        assert group.expired == 1
        assert group.requests == 1


def test_cached_tokens_are_not_to_be_computed() -> None:
    """Of 1000 tokens 900 are cached by the rank; at least one is always computed."""
    group = make_group(2)
    group.ranks[0].reserve(1000, NOW)
    group.ranks[1].reserve(1000, NOW, cached=900)
    group.ranks[1].reserve(1000, NOW, cached=1000)

    assert group.loads == [250, 100 + 1]


def test_the_cost_of_a_request_that_fits_under_the_fullest_rank() -> None:
    """(400 + 800)/2 are left of the running step; then one step of 400 + 600 follows, on whichever rank."""
    group = make_group()
    group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(600, NOW)
    group.survey(NOW)

    assert group.cost(0, 500) == 600 + 400 + 600


def test_the_cost_of_a_request_that_lengthens_the_step() -> None:
    """600 -> 900 lengthens the step by 300 for the waiting request, and by three quarters of it for later ones."""
    group = make_group()
    group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(600, NOW)
    group.survey(NOW)

    assert group.cost(1, 900) == 600 + 400 + 900 + 1 * 300 + 225


def test_a_request_waits_for_the_steps_of_its_own_rank_only() -> None:
    """With 1000 tokens per step, 500 tokens are done after one full step, although another rank has four to go."""
    group = make_group()
    first = group.ranks[0].reserve(1000, NOW)
    group.ranks[0].reserve(5000, NOW)
    first.complete(LATER)  # 1000 of the 5000 run, 4000 wait, and 250 more for those that run
    group.survey(NOW)

    assert group.loads == [4250, 0]
    assert group.cost(1, 500) == (400 + 1000) / 2 + 400 + 1000
    assert group.cost(1, 1500) == (400 + 1000) / 2 + 2 * (400 + 1000)


def test_an_idle_engine_costs_its_steps() -> None:
    """One step for a short prompt, three for a long one; later requests wait three quarters, of two steps at most."""
    group = make_group()

    assert group.cost(0, 80) == 400 + 80 + 60
    assert group.cost(0, 1800) == 2 * 400 + 1800 + 1350
    assert group.cost(0, 2800) == 3 * 400 + 2800 + 1500
