"""Slow prefill engines get fewer tokens, by the steps that they count, and more time."""

import pytest

from dp_extproc.config.reliability import SupervisionSettings
from dp_extproc.engines.model import LoadPage, PrefillSteps, RankSample, Role
from dp_extproc.request.path import Api
from dp_extproc.scheduling.decision import Decision
from fleet_fixtures import Fleet, make_facts


def make_fleet(version: tuple[int, int, int], *per_token: float) -> Fleet:
    """Make a fleet of prefill engines that have counted a minute of steps with so many seconds per token."""
    facts = make_facts(Role.PREFILL, version)
    fleet = Fleet(
        prefills=[facts] * len(per_token),
        decodes=[make_facts(Role.DECODE, version)],
        policy={"affinity": {"prefixes": False}},
    )
    for second in range(61):
        fleet.clock.now += 1
        for number, each in enumerate(per_token, start=1):
            endpoint = fleet.endpoint(Role.PREFILL, number).configured
            ranks = tuple(
                RankSample(rank, used_tokens=0, prefilled=PrefillSteps(second / each, float(second)), age=0.0)
                for rank in range(4)
            )
            fleet.load.sampled(endpoint, LoadPage(ranks), fleet.clock(), fleet.clock())
    return fleet


def place(fleet: Fleet, tokens: int) -> Decision:
    decision = fleet.scheduler.place(Api.GENERATE, b'{"input_ids": [%s]}' % b",".join([b"7"] * tokens))
    assert isinstance(decision, Decision)
    return decision


@pytest.mark.parametrize(
    ("version", "share"),
    [pytest.param((0, 5, 23), 2.0, id="counted"), pytest.param((0, 5, 17), 1.0, id="not comparable")],
)
def test_engine_gets_tokens_by_its_measured_speed(version: tuple[int, int, int], share: float) -> None:
    """An engine of half the speed gets half of the tokens; counts of 0.5.17 are not compared."""
    fleet = make_fleet(version, 1e-4, 2e-4)
    for number in range(120):
        place(fleet, 500 + number % 7 * 400)
    fast, slow = (fleet.endpoint(Role.PREFILL, number).tokens for number in (1, 2))

    assert fast / slow == pytest.approx(share, rel=0.25)


def test_prefill_timeout_fits_a_prompt_that_needs_longer() -> None:
    """Twice the expected time is given, up to half of the other timeout more."""
    settings = SupervisionSettings.model_validate({"prefill_timeout": "10s", "first_token_timeout": "60s"})
    fleet = make_fleet((0, 5, 23), 1e-3)
    short, long, longest = (place(fleet, tokens).in_flight for tokens in (100, 9_000, 60_000))

    assert short is not None
    assert long is not None
    assert longest is not None
    assert settings.prefill_timeout_of(short.expected_prefill) == 10
    assert 18 < settings.prefill_timeout_of(long.expected_prefill) < 25
    assert settings.prefill_timeout_of(longest.expected_prefill) == settings.longest_prefill == 40
