"""An in-flight request ends its reservations exactly once, whatever happens in whatever order."""

from itertools import permutations

import pytest

from dp_extproc.engines.model import Role
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.in_flight import InFlight
from fleet_fixtures import Fleet, make_facts

EVENTS = ("prefill", "first_byte", "end")


def _apply(attempt: InFlight, event: str, now: float) -> None:
    if event == "prefill":
        attempt.prefill_answered(200, now)
    elif event == "first_byte":
        attempt.first_byte(200, now)
    else:
        attempt.end(now)


@pytest.mark.parametrize("leg", ["leg", ""], ids=["reported", "mute"])
@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize(
    "events",
    [order for length in range(4) for order in permutations(EVENTS, length)],
    ids=lambda order: "-".join(order) or "none",
)
def test_the_load_is_zero_after_the_end(events: tuple[str, ...], streaming: bool, leg: str) -> None:
    """Events may be missing, come in any order, and twice; after the end the load is exactly zero."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
    prefill, decode = fleet.endpoint(Role.PREFILL), fleet.endpoint(Role.DECODE)
    answered: list[int] = []
    attempt = InFlight(
        1,
        0,
        prefill.reserve(1, 70, 0),
        decode.reserve(2, 70, 0),
        leg=leg,
        streaming=streaming,
        on_prefill_answer=answered.append,
    )
    for now, event in enumerate((*events, *events), start=1):
        _apply(attempt, event, now)

    over = "end" in events
    shows = {"prefill"} if streaming or leg else {"prefill", "first_byte"}
    answering = {"prefill"} if streaming else {"prefill", "first_byte"}
    assert prefill.requests == (0 if over or shows.intersection(events) else 1)
    assert decode.requests == (0 if over else 1)
    assert prefill.tokens == 0 if prefill.requests == 0 else prefill.tokens > 0
    assert decode.tokens == 0 if over else decode.tokens >= 70
    applied = answering.intersection(events[: events.index("end")]) if over else shows.intersection(events)
    assert answered == ([200] if applied else [])


class TestAnEndWithoutPrefill:
    """Two requests wait on a prefill rank; the second one ends without a response of its leg."""

    @pytest.fixture
    def fleet(self) -> Fleet:
        return Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])

    @staticmethod
    def attempts(fleet: Fleet, *, streaming: bool = False) -> list[InFlight]:
        prefill, decode = fleet.endpoint(Role.PREFILL), fleet.endpoint(Role.DECODE)
        return [
            InFlight(number, 0, prefill.reserve(1, 40_000, 0), decode.reserve(2, 40_000, 0), streaming=streaming)
            for number in range(2)
        ]

    def test_a_client_that_leaves_moves_no_other_request(self, fleet: Fleet) -> None:
        """The first one is as far from its turn as it was before."""
        _, cancelled = self.attempts(fleet)
        before = fleet.endpoint(Role.PREFILL).tokens
        cancelled.end(1)

        assert fleet.endpoint(Role.PREFILL).tokens == before - 40_000

    def test_an_error_moves_no_other_request(self, fleet: Fleet) -> None:
        """Engines refuse requests at once, and Envoy answers for engines that are gone."""
        _, failed = self.attempts(fleet)
        before = fleet.endpoint(Role.PREFILL).tokens
        failed.prefill_answered(503, 1)
        failed.end(1)

        assert fleet.endpoint(Role.PREFILL).tokens == before - 40_000

    def test_a_whole_response_completes_the_prompt(self, fleet: Fleet) -> None:
        """Decode could not have responded otherwise; first in, first out, the other one is computed, too."""
        _, answered = self.attempts(fleet)
        answered.first_byte(200, 1)

        assert fleet.endpoint(Role.PREFILL).tokens == 0

    def test_a_whole_response_stands_for_no_leg_that_is_reported(self, fleet: Fleet) -> None:
        """The leg's own response ends the step; if its report is lost, the end of the request does."""
        prefill, decode = fleet.endpoint(Role.PREFILL), fleet.endpoint(Role.DECODE)
        attempt = InFlight(1, 0, prefill.reserve(1, 40_000, 0), decode.reserve(2, 40_000, 0), leg="leg")
        before = prefill.tokens
        attempt.first_byte(200, 1)
        after = prefill.tokens
        attempt.end(2)

        assert (after, prefill.tokens, attempt.prefill_status) == (before, 0, 200)

    def test_the_headers_of_a_stream_complete_no_prompt(self, fleet: Fleet) -> None:
        """Engines send them before the first token is computed."""
        _, begun = self.attempts(fleet, streaming=True)
        before = fleet.endpoint(Role.PREFILL).tokens
        begun.first_byte(200, 1)

        assert fleet.endpoint(Role.PREFILL).tokens == before


@pytest.mark.parametrize(("status", "lasted"), [(200, 2), (500, None)])
def test_an_error_is_no_duration_of_a_sequence(status: int, lasted: float | None) -> None:
    """An engine that fails at once is not a fast one."""
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
    prefill, decode = fleet.endpoint(Role.PREFILL), fleet.endpoint(Role.DECODE)
    for number in range(60):
        attempt = InFlight(number, 0, prefill.reserve(1, 70, 0), decode.reserve(2, 70, 0), leg="leg")
        attempt.prefill_answered(200, 1)
        attempt.first_byte(status, 3)
        attempt.end(3)
    (group,) = decode.groups
    assert isinstance(group, DecodeGroup)

    assert group.pace.duration == lasted


def test_the_first_byte_of_an_aggregated_endpoint_completes_its_prompt() -> None:
    """Such an endpoint has no prefill leg; its response headers stand for the response of one."""
    worker = Fleet(workers=[make_facts(Role.WORKER)]).endpoint(Role.WORKER)
    answered: list[int] = []
    attempt = InFlight(1, 0, (), worker.reserve(0, 70, 0), on_prefill_answer=answered.append)
    queued = worker.tokens
    attempt.first_byte(200, 1)
    before = worker.tokens
    attempt.end(2)

    assert answered == [200]
    assert queued - before == 70  # to be computed no more, but still to be held
    assert (before >= 70, worker.tokens) == (True, 0)
