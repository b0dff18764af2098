"""Prefill ranks count what has not started: a ledger that the answers of prefill legs move forward."""

from typing import Any

import pytest

from dp_extproc.engines.model import RankSample
from dp_extproc.load.prefill import ARRIVAL_LAG, PrefillGroup
from fleet_fixtures import absorb_sample

NOW = 1000.0
LATER = NOW + 2 * ARRIVAL_LAG


def make_group(ranks: int = 2, budget: float = 1000, *, chunked: bool = True) -> PrefillGroup:
    return PrefillGroup(range(ranks), budget=budget, chunked=chunked, step_tokens=400)


def test_a_request_to_an_idle_server_starts_at_once() -> None:
    """It is in the running step, which weighs a quarter; a second one waits for the next step and weighs all."""
    group = make_group()
    group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(800, NOW)

    assert group.loads == [200, 800]


def test_an_answer_tells_that_a_step_has_ended_for_every_rank() -> None:
    """When rank 0 answers, what waits on rank 1 and had arrived by then has started."""
    group = make_group()
    first = group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(800, NOW)
    first.complete(LATER)

    assert group.loads == [0, 200]


def test_what_was_sent_a_moment_ago_has_not_started() -> None:
    """The step that just began could not know a request that is still being tokenized."""
    group = make_group()
    first = group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(800, NOW)
    group.ranks[1].reserve(60, LATER - ARRIVAL_LAG / 2)
    first.complete(LATER)

    assert group.loads == [0, 200 + 60]


def test_a_server_that_has_nothing_else_starts_it_all_the_same() -> None:
    """With nothing older to run the server starts what arrives."""
    group = make_group()
    first = group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(60, LATER - ARRIVAL_LAG / 2)
    first.complete(LATER)

    assert group.loads == [0, 15]


def test_two_answers_of_one_step_are_one_step() -> None:
    """Both requests ran in the step that ended; the second answer moves nothing further."""
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


def test_answers_to_requests_that_are_known_to_be_computed_are_no_step() -> None:
    """Their KV cache was still on its way; the step they ran in had ended before."""
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


def test_an_answer_out_of_turn_tells_that_those_before_it_are_done() -> None:
    """Ranks work first in, first out: an event that was lost is made good by the next one."""
    group = make_group(1)
    group.ranks[0].reserve(900, NOW)
    group.ranks[0].reserve(900, NOW)
    last = group.ranks[0].reserve(900, NOW)
    last.complete(LATER)

    assert group.loads == [0]


class TestWithdrawn:
    """Clients leave and legs fail: that tells nothing of steps."""

    def test_nothing_else_moves(self) -> None:
        """Ten requests of 4000 tokens, of which the newest is given up: nine are left."""
        group = make_group(1)
        first, *_, newest = [group.ranks[0].reserve(4000, NOW) for _ in range(10)]
        newest.cancel(LATER)
        after = list(group.loads)
        first.cancel(LATER)

        assert after == [3000 + 250 + 8 * 4000]
        assert group.loads == [7 * 4000 + 3000 + 250]  # the next one starts, as nothing else runs

    def test_the_running_step_goes_on(self) -> None:
        """What waits on the other ranks waits for those that run still."""
        group = make_group(3)
        one = group.ranks[0].reserve(500, NOW)
        two = group.ranks[1].reserve(800, NOW)
        group.ranks[2].reserve(600, NOW)
        one.complete(LATER)  # both others run now
        group.ranks[0].reserve(900, LATER)
        two.cancel(LATER + 1)

        assert group.loads == [900, 0, 150]

    def test_it_is_no_sign_of_life(self) -> None:
        """Clients that leave do not keep old requests on the books."""
        group = make_group(2)
        group.ranks[0].reserve(800, NOW)
        leaving = group.ranks[1].reserve(1000, NOW)
        group.ranks[1].reserve(1000, NOW)
        leaving.cancel(NOW + 0.9)
        group.refresh(NOW + 1)

        assert group.loads == [200, 250]

    def test_what_was_computed_already_is_not_taken_off_twice(self) -> None:
        """A later answer of its rank told so; the end comes without its own."""
        group = make_group(1)
        silent, answered = (group.ranks[0].reserve(400, NOW) for _ in range(2))
        answered.complete(LATER)
        silent.cancel(LATER + 1)

        assert group.loads == [0]
        assert group.requests == 0


class TestSilence:
    """Traffic whose events are missing: time alone tells."""

    def test_after_a_second_what_waits_counts_as_started(self) -> None:
        """1000 tokens waiting weigh 250 then."""
        group = make_group(2)
        group.ranks[0].reserve(800, NOW)
        group.ranks[1].reserve(1000, NOW)
        assert group.due == NOW + 1
        group.refresh(NOW + 1)

        assert group.loads == [200, 250]

    @pytest.mark.parametrize(("seconds", "left"), [(7.9, 1500.0), (8.0, 0.0)])
    def test_what_is_very_old_is_forgotten(self, seconds: float, left: float) -> None:
        """6000 tokens are forgotten after eight seconds."""
        group = make_group(1)
        group.ranks[0].reserve(6000, NOW)
        group.refresh(NOW + seconds)

        assert group.loads == [left]

    def test_events_put_it_off(self) -> None:
        """While answers come in, a long queue is a long queue."""
        group = make_group(2)
        first = group.ranks[0].reserve(800, NOW)
        for _ in range(3):
            group.ranks[1].reserve(1000, NOW)
        first.complete(NOW + 1.5)
        group.refresh(NOW + 2)

        assert group.loads == [0, 2000 + 250]

    def test_what_waits_behind_a_long_prompt_is_not_forgotten(self) -> None:
        """Without chunks 120,000 tokens are one step of many seconds, for the other rank, too."""
        group = make_group(2, chunked=False)
        group.ranks[0].reserve(120_000, NOW)
        for _ in range(20):
            group.ranks[0].reserve(300, NOW)
        group.ranks[1].reserve(300, NOW)
        group.refresh(NOW + 15)

        assert group.loads == [30_000 + 20 * 300, 300]

    def test_if_the_long_one_gets_no_event_all_is_forgotten_in_the_end(self) -> None:
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
        assert 0 < without < 2000
        assert group.loads == [0]

    def test_a_server_that_has_shown_to_be_slow_is_given_time(self) -> None:
        """A step of 1000 tokens took 4.2 s, so that the next one may, too."""
        group = make_group(1)
        first = group.ranks[0].reserve(1000, NOW)
        for _ in range(3):
            group.ranks[0].reserve(1000, NOW)
        first.complete(NOW + 4.2)
        group.refresh(NOW + 9)

        assert group.loads == [250 + 2000]

    def test_steps_without_an_answer_make_no_server_slow(self) -> None:
        """Ten chunks of a long prompt took a second each: what follows is overdue after a few."""
        group = make_group(1)
        long = group.ranks[0].reserve(10_000, NOW)
        group.ranks[0].reserve(1000, NOW)
        group.ranks[0].reserve(1000, NOW)
        long.complete(NOW + 10)
        before = list(group.loads)
        group.refresh(NOW + 10 + 3)

        assert before == [250 + 1000]
        assert group.loads == [250 + 250]

    def test_a_late_event_of_a_forgotten_request_changes_nothing(self) -> None:
        """It is released like any other, and the books stay true."""
        group = make_group(1)
        late = group.ranks[0].reserve(100, NOW)
        group.refresh(NOW + 60)
        group.ranks[0].reserve(70, NOW + 60)
        late.complete(NOW + 61)

        assert group.loads == [17.5]
        assert group.requests == 1


def sample(group: PrefillGroup, at: float, used_tokens: int = 0, **fields: Any) -> None:
    absorb_sample(group, RankSample(0, used_tokens, **fields), at)


class TestOthers:
    """What samples show beyond our own books."""

    @pytest.mark.parametrize(
        ("fields", "others"),
        [
            ({"waiting_uncached_tokens": 900, "total_tokens": 5000, "used_tokens": 4000}, 600),
            ({"total_tokens": 5000, "used_tokens": 4000}, 700),
            ({"used_tokens": 4000}, 3700),
        ],
        ids=["0.5.13", "0.5.11", "older"],
    )
    def test_the_best_field_counts(self, fields: dict[str, int], others: float) -> None:
        """Tokens to be computed, else queued tokens, else tokens in use; 300 of them are ours."""
        group = make_group(1)
        group.ranks[0].reserve(300, NOW)
        sample(group, NOW + 1, waiting_requests=3, **fields)

        assert group.external == [others]
        assert group.loads == [others + 75]

    def test_what_is_computed_explains_nothing(self) -> None:
        """A prompt of ours that had been computed is not among the tokens that a later sample shows as waiting."""
        group = make_group(1)
        group.ranks[0].reserve(300, NOW).complete(NOW + 1)
        sample(group, NOW + 2, waiting_uncached_tokens=300, waiting_requests=1)

        assert group.loads == [300]

    def test_more_tokens_without_more_requests_are_ours(self) -> None:
        """A prompt that is longer than we took it for is no load of others; it will be gone with ours."""
        group = make_group(1)
        group.ranks[0].reserve(300, NOW)
        sample(group, NOW + 1, waiting_uncached_tokens=1200, waiting_requests=1)

        assert group.external == [0]

    def test_an_empty_engine_has_lost_what_was_sent_long_ago(self) -> None:
        """Requests that no event ended are written off once the engine shows that it has nothing at all."""
        group = make_group(1)
        group.ranks[0].reserve(300, NOW)
        group.ranks[0].reserve(300, NOW + 20)
        sample(group, NOW + 21)

        assert group.expired == 1
        assert group.requests == 1


def test_cached_tokens_are_not_to_be_computed() -> None:
    """Of 1000 tokens 900 are held by the rank; at least one is computed always."""
    group = make_group(2)
    group.ranks[0].reserve(1000, NOW)
    group.ranks[1].reserve(1000, NOW, cached=900)
    group.ranks[1].reserve(1000, NOW, cached=1000)

    assert group.loads == [250, 100 + 1]


def test_the_cost_of_a_request_that_fits_under_the_fullest_rank() -> None:
    """(400 + 800)/2 are left of the running step; then one step of 400 + 600 does it, whoever is the fullest."""
    group = make_group()
    group.ranks[0].reserve(800, NOW)
    group.ranks[1].reserve(600, NOW)
    group.survey(NOW)

    assert group.cost(0, 500) == 600 + 400 + 600


def test_the_cost_of_a_request_that_lengthens_the_step() -> None:
    """600 -> 900 makes the step longer by 300 for the one who waits, and by three quarters of it for those who come."""
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


def test_an_idle_server_costs_its_steps() -> None:
    """One step for a short prompt, three for a long one; those to come pay three quarters, of two steps at most."""
    group = make_group()

    assert group.cost(0, 80) == 400 + 80 + 60
    assert group.cost(0, 1800) == 2 * 400 + 1800 + 1350
    assert group.cost(0, 2800) == 3 * 400 + 2800 + 1500
