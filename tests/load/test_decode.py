"""Decode ranks count the context that every step reads, and a fixed cost for each sequence."""

import pytest

from dp_extproc.engines.model import RankSample
from dp_extproc.estimators.decode_pace import DEFAULT_TPOT
from dp_extproc.load.attribution import Reading, absorb
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.rank import Reservation
from fleet_fixtures import absorb_sample

NOW = 1000.0


def make_group(ranks: int = 2, *, computes: bool = False) -> DecodeGroup:
    return DecodeGroup(range(ranks), request_tokens=1000, computes=computes)


def test_a_sequence_costs_its_prompt_and_a_fixed_amount() -> None:
    """Two sequences of 300 tokens cost 2600."""
    group = make_group()
    for _ in range(2):
        group.ranks[0].reserve(300, NOW)

    assert group.loads == [2600, 0]


def test_it_grows_from_the_first_token_on_at_the_pace_of_its_server() -> None:
    """At 30 ms per token it is 100 tokens longer after three seconds; the wait for the first token adds nothing."""
    group = make_group()
    reservation = group.ranks[0].reserve(300, NOW)
    group.refresh(NOW + 10)
    before = group.loads[0]
    reservation.first_token(NOW + 10)
    group.refresh(NOW + 13)

    assert before == 1300
    assert group.loads[0] == pytest.approx(1400)
    assert DEFAULT_TPOT == 0.03


def test_an_old_sample_teaches_nothing_anew() -> None:
    """When the others it showed are forgotten, the pace stays as the samples told it, each of them once."""
    group = make_group()
    for rate in (1000.0, 1000.0, 500.0):
        absorb_sample(group, RankSample(0, 0, running_requests=20, tokens_per_second=rate), NOW)
    before = group.pace.reported
    group.forget_external(NOW + 60)

    assert group.external_requests == 0
    assert group.pace.reported == before


def test_with_nothing_in_flight_the_books_are_exactly_zero() -> None:
    """Whatever floating point makes of the sums, and in whatever order the ends come."""
    group = make_group()
    reservations = [group.ranks[0].reserve(0.1 * number, NOW) for number in range(1, 30)]
    for number, reservation in enumerate(reservations):
        reservation.first_token(NOW + 0.1 * number)
    for reservation in (*reservations[::2], *reservations[1::2], *reservations):
        reservation.complete(NOW + 70)

    assert group.loads == [0, 0]
    assert group.requests == 0


def test_a_first_token_after_the_end_is_ignored() -> None:
    """Late events find nothing that could grow."""
    group = make_group()
    reservation = group.ranks[0].reserve(300, NOW)
    reservation.complete(NOW + 1)
    reservation.first_token(NOW + 2)
    group.refresh(NOW + 90)

    assert group.loads == [0, 0]


@pytest.mark.parametrize(
    ("capacity", "hours"), [(None, 8.7), (20_000, 1.0), (1_000_000, 16.6)], ids=["unknown", "small", "large"]
)
def test_what_is_older_than_any_sequence_can_be_goes(capacity: int | None, hours: float) -> None:
    """At 30 ms per token, twice the KV cache of a rank or a million tokens; an hour at least."""
    group = make_group(1)
    if capacity is not None:
        absorb_sample(group, RankSample(0, 50, running_requests=1, capacity_tokens=capacity), NOW)
    reservation = group.ranks[0].reserve(50, NOW)
    reservation.first_token(NOW)
    group.survey(NOW + 3600 * hours)
    before = group.requests
    group.survey(NOW + 3600 * (hours + 0.1))

    assert (before, group.requests, group.expired) == (1, 0, 1)
    assert group.loads[0] == group.external[0]


def test_what_others_cause_comes_on_top_with_its_sequences() -> None:
    """A sample of 5000 tokens and 4 sequences, of which 1300 and one are ours (300 prompt, 1000 grown)."""
    group = make_group()
    reservation = group.ranks[0].reserve(300, NOW)
    reservation.first_token(NOW)
    at = NOW + 30
    absorb_sample(group, RankSample(0, used_tokens=4000, total_tokens=5000, running_requests=4), at)

    assert group.external[0] == pytest.approx(5000 - 1300 + 3 * 1000)
    assert group.loads[0] == pytest.approx(group.external[0] + 1300 + 1000)


def test_a_worker_counts_a_prompt_twice_until_it_is_computed() -> None:
    """It computes the prompt and holds it; what its cache holds already is computed no more."""
    group = make_group(computes=True)
    reservation = group.ranks[0].reserve(500, NOW, cached=200)
    queued = group.loads[0]
    reservation.first_token(NOW)

    assert isinstance(reservation, Reservation)
    assert queued == 500 + 300 + 1000
    assert group.loads[0] == 500 + 1000


def test_the_cost_is_the_fullest_rank_and_what_it_slows_down() -> None:
    """Each of the three sequences pays for what the fullest rank grows, and for what the ranks get more on average.

    The new sequence's own fixed cost of 1000 tokens counts.
    """
    group = make_group()
    for _ in range(3):
        group.ranks[0].reserve(1000, NOW)
    group.survey(NOW)

    assert group.cost(1, 5000) == pytest.approx(6000 + 0.3 * 3 * 6000 / 2)
    assert group.cost(1, 5500) == pytest.approx(6500 + 0.3 * 3 * (500 + 6500 / 2))
    assert group.cost(1, 7000) == pytest.approx(8000 + 0.3 * 3 * (2000 + 8000 / 2))


def test_the_growth_of_the_fullest_rank_counts_for_twenty_sequences_at_most() -> None:
    """Else a large server of short sequences would never be worth a long one. The room is taken from all of them."""
    group = make_group(4)
    for _ in range(50):
        group.ranks[0].reserve(1000, NOW)
    group.survey(NOW)

    assert group.top == 100_000
    assert group.cost(1, 109_000) == pytest.approx(110_000 + 0.3 * (20 * 10_000 + 50 * 110_000 / 4))


def test_room_under_the_fullest_rank_costs_those_who_run_beside_it() -> None:
    """It is not free, so a long sequence is not sent to one server again and again only because it fits there."""
    busy, quiet = make_group(4), make_group(4)
    for group, sequences in ((busy, 9), (quiet, 1)):
        for _ in range(sequences):
            group.ranks[0].reserve(9_000 / sequences, NOW)
        group.survey(NOW)
    busy_added, quiet_added = busy.cost(1, 5000) - busy.top, quiet.cost(1, 5000) - quiet.top

    assert busy.top > 6000 < quiet.top
    assert busy_added == pytest.approx(9 * quiet_added)
    assert quiet_added == pytest.approx(0.3 * 6000 / 4)


def test_a_rank_without_kv_room_costs_more_than_any_other() -> None:
    """85 % of the capacity may be promised; fixed costs of sequences are no KV tokens."""
    group = make_group(1)
    absorb_sample(group, RankSample(0, 0, capacity_tokens=10_000), NOW)
    for _ in range(4):
        group.ranks[0].reserve(2000, NOW)

    assert group.cost(0, group.loads[0] + 400) < 1e6
    assert group.cost(0, group.loads[0] + 600) > 1e9


def test_the_fixed_costs_of_others_are_no_kv_tokens_either() -> None:
    """300 sequences that hold 5000 tokens leave 3500 of the 8500 that may be promised."""
    group = make_group(1)
    sample = RankSample(0, used_tokens=5000, total_tokens=5000, running_requests=300, capacity_tokens=10_000)
    absorb_sample(group, sample, NOW)

    assert group.cost(0, group.loads[0] + 3400) < 1e9
    assert group.cost(0, group.loads[0] + 3600) > 1e9


@pytest.mark.parametrize(("told", "loads"), [(4000, [6000, 3000, 0]), (1500, [3500, 1750, 0])], ids=["more", "less"])
def test_what_was_misjudged_goes_with_the_requests(told: int, loads: list[float]) -> None:
    """The engine may not be heard for long, and what it said of requests is nothing to those that follow."""
    group = make_group()
    reservations = [group.ranks[0].reserve(1000, NOW) for _ in range(2)]
    sample = RankSample(0, used_tokens=told, total_tokens=told, running_requests=2)
    absorb_sample(group, sample, NOW + 1)
    found = [group.loads[0]]
    for each in reservations:
        each.complete(NOW + 2)
        found.append(group.loads[0])

    assert found == loads


@pytest.mark.parametrize(
    ("told", "load"),
    [(4000, 4000 + 2000), (900, 1000 + 2000), (1500, 1500 + 2000)],
    ids=["more", "far less", "less"],
)
def test_the_engine_knows_better_how_long_our_sequences_are(told: int, load: float) -> None:
    """Two sequences taken for 2000 tokens: its count goes, either way, but never below a half of ours."""
    group = make_group()
    for _ in range(2):
        group.ranks[0].reserve(1000, NOW)
    sample = RankSample(0, used_tokens=told, total_tokens=told, running_requests=2)
    absorb_sample(group, sample, NOW + 1)

    assert group.loads[0] == load


@pytest.mark.parametrize("reported", [4000, 1200], ids=["more", "less"])
@pytest.mark.parametrize("is_share", [False, True], ids=["own", "share"])
@pytest.mark.parametrize("ended", [1, 2])
def test_a_late_sample_corrects_only_what_is_still_open(ended: int, reported: int, *, is_share: bool) -> None:
    """The count of an engine may arrive after the requests that it counted have ended: their part goes with them."""
    group = make_group(1)
    rank = group.ranks[0]
    reservations = [rank.reserve(1000, NOW, is_share=is_share) for _ in range(2)]
    sample = RankSample(0, used_tokens=reported, total_tokens=reported, running_requests=2)
    for each in reservations[:ended]:
        each.complete(NOW + 2)
    absorb([Reading(group, rank, sample, NOW + 1)], 1, NOW + 3)

    still_open = 2 - ended
    assert rank.external_tokens == (reported - 2000) / 2 * still_open
    assert rank.reserved_tokens == 2000 * still_open
    assert rank.tokens == (reported + 2000) / 2 * still_open


def test_a_count_that_knows_nothing_of_us_is_not_believed() -> None:
    """It is old, or of another server: ours stand."""
    group = make_group()
    for _ in range(4):
        group.ranks[0].reserve(1000, NOW)
    absorb_sample(group, RankSample(0, used_tokens=50, total_tokens=50, running_requests=1), NOW + 1)

    assert group.loads[0] == 4 * 2000
