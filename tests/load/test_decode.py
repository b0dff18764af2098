"""Decode ranks count the context that every step reads, and a fixed cost for each sequence."""

import pytest

from dp_extproc.engines.model import RankSample
from dp_extproc.estimators.decode_pace import DEFAULT_TPOT
from dp_extproc.load.attribution import Reading, absorb
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.step_group import Reservation
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


def test_a_sequence_grows_from_its_first_token_at_the_tpot_of_its_engine() -> None:
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


def test_dropping_external_load_leaves_the_tpot() -> None:
    """Each sample counts once for the time per output token, also when its external load is dropped later."""
    group = make_group()
    for rate in (1000.0, 1000.0, 500.0):
        absorb_sample(group, RankSample(0, 0, running_requests=20, tokens_per_second=rate), NOW)
    before = group.pace.reported
    group.forget_external(NOW + 60)

    assert group.external_requests == 0
    assert group.pace.reported == before


def test_the_load_is_exactly_zero_with_nothing_in_flight() -> None:
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
def test_a_sequence_expires_when_it_is_older_than_any_can_be(capacity: int | None, hours: float) -> None:
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


def test_external_load_is_added_with_its_sequences() -> None:
    """A sample has 5000 tokens and 4 sequences, of which 1300 and one are reserved (300 prompt, 1000 grown)."""
    group = make_group()
    reservation = group.ranks[0].reserve(300, NOW)
    reservation.first_token(NOW)
    at = NOW + 30
    absorb_sample(group, RankSample(0, used_tokens=4000, total_tokens=5000, running_requests=4), at)

    assert group.external[0] == pytest.approx(5000 - 1300 + 3 * 1000)
    assert group.loads[0] == pytest.approx(group.external[0] + 1300 + 1000)


def test_an_aggregated_endpoint_counts_a_prompt_twice_until_it_is_computed() -> None:
    """It computes the prompt and keeps it; cached tokens need not be computed."""
    group = make_group(computes=True)
    reservation = group.ranks[0].reserve(500, NOW, cached=200)
    queued = group.loads[0]
    reservation.first_token(NOW)

    assert isinstance(reservation, Reservation)
    assert queued == 500 + 300 + 1000
    assert group.loads[0] == 500 + 1000


def test_the_cost_is_the_fullest_rank_and_what_it_slows_down() -> None:
    """Each of the three sequences is slowed by the growth of the fullest rank, and by that of the average rank.

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
    """Otherwise a large engine of short sequences would never get a long one. The room is taken from all of them."""
    group = make_group(4)
    for _ in range(50):
        group.ranks[0].reserve(1000, NOW)
    group.survey(NOW)

    assert group.top == 100_000
    assert group.cost(1, 109_000) == pytest.approx(110_000 + 0.3 * (20 * 10_000 + 50 * 110_000 / 4))


def test_room_under_the_fullest_rank_is_not_free() -> None:
    """Otherwise one engine would get long sequence after long sequence, only because they fit there."""
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
    """85 % of the capacity may be reserved; fixed costs of sequences are no KV tokens."""
    group = make_group(1)
    absorb_sample(group, RankSample(0, 0, capacity_tokens=10_000), NOW)
    for _ in range(4):
        group.ranks[0].reserve(2000, NOW)

    assert group.cost(0, group.loads[0] + 400) < 1e6
    assert group.cost(0, group.loads[0] + 600) > 1e9


def test_fixed_costs_of_external_sequences_are_no_kv_tokens() -> None:
    """300 sequences with 5000 tokens leave 3500 of the 8500 that may be reserved."""
    group = make_group(1)
    sample = RankSample(0, used_tokens=5000, total_tokens=5000, running_requests=300, capacity_tokens=10_000)
    absorb_sample(group, sample, NOW)

    assert group.cost(0, group.loads[0] + 3400) < 1e9
    assert group.cost(0, group.loads[0] + 3600) > 1e9


@pytest.mark.parametrize(
    ("reported", "loads"), [(4000, [6000, 3000, 0]), (1500, [3500, 1750, 0])], ids=["more", "less"]
)
def test_a_misestimated_length_ends_with_its_requests(reported: int, loads: list[float]) -> None:
    """The next sample may be far away, and the last one is no evidence for the requests that follow."""
    group = make_group()
    reservations = [group.ranks[0].reserve(1000, NOW) for _ in range(2)]
    sample = RankSample(0, used_tokens=reported, total_tokens=reported, running_requests=2)
    absorb_sample(group, sample, NOW + 1)
    found = [group.loads[0]]
    for each in reservations:
        each.complete(NOW + 2)
        found.append(group.loads[0])

    assert found == loads


@pytest.mark.parametrize(
    ("reported", "load"),
    [(4000, 4000 + 2000), (900, 1000 + 2000), (1500, 1500 + 2000)],
    ids=["more", "far less", "less"],
)
def test_the_engines_count_corrects_our_estimate_of_lengths(reported: int, load: float) -> None:
    """Two sequences are estimated at 2000 tokens: the count replaces that, up or down, but never below a half."""
    group = make_group()
    for _ in range(2):
        group.ranks[0].reserve(1000, NOW)
    sample = RankSample(0, used_tokens=reported, total_tokens=reported, running_requests=2)
    absorb_sample(group, sample, NOW + 1)

    assert group.loads[0] == load


@pytest.mark.parametrize("reported", [4000, 1200], ids=["more", "less"])
@pytest.mark.parametrize("is_share", [False, True], ids=["own", "share"])
@pytest.mark.parametrize("ended", [1, 2])
def test_a_late_sample_corrects_only_open_reservations(ended: int, reported: int, *, is_share: bool) -> None:
    """Some requests in it may have ended when it arrives: their part of the correction ends with them."""
    group = make_group(1)
    rank = group.ranks[0]
    reservations = [rank.reserve(1000, NOW, is_share=is_share) for _ in range(2)]
    sample = RankSample(0, used_tokens=reported, total_tokens=reported, running_requests=2)
    for each in reservations[:ended]:
        each.complete(NOW + 2)
    absorb([Reading(rank, sample, NOW + 1)], 1, NOW + 3)

    still_open = 2 - ended
    assert rank.external_tokens == (reported - 2000) / 2 * still_open
    assert rank.reserved_tokens == 2000 * still_open
    assert rank.tokens == (reported + 2000) / 2 * still_open


def test_a_sample_with_few_of_our_requests_corrects_nothing() -> None:
    """It is old, or of another engine: the reservations stand."""
    group = make_group()
    for _ in range(4):
        group.ranks[0].reserve(1000, NOW)
    absorb_sample(group, RankSample(0, used_tokens=50, total_tokens=50, running_requests=1), NOW + 1)

    assert group.loads[0] == 4 * 2000
