"""What a rank takes, and what fits nowhere."""

import json
from random import Random
from typing import Any

import pytest

from dp_extproc.config.reliability import AdmissionSettings, QueueSettings
from dp_extproc.fleet.endpoint import LoadPage, RankSample, Role
from dp_extproc.placement.decision import Circumstances, Decision
from dp_extproc.placement.dispatcher import Dispatcher
from dp_extproc.placement.queue import WaitingLine
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from placement.fleet_fixtures import Fleet, make_endpoint, make_facts

CAPACITY, RUNNING = 1000, 2


def ids(tokens: int) -> bytes:
    return json.dumps({"input_ids": list(range(tokens))}).encode()


class Small:
    """One prefill and one decode server of two ranks, each of which holds 1000 tokens and runs two requests."""

    def __init__(self, line: WaitingLine | None = None, **limits: Any) -> None:
        self.fleet = Fleet(prefills=[make_facts(Role.PREFILL, ranks=2)], decodes=[make_facts(Role.DECODE, ranks=2)])
        ranks = tuple(
            RankSample(rank, used_tokens=0, capacity_tokens=CAPACITY, max_running_requests=RUNNING, age=0.0)
            for rank in range(2)
        )
        for role in (Role.PREFILL, Role.DECODE):
            self.fleet.load.sampled(make_endpoint(role), LoadPage(ranks), self.fleet.clock(), self.fleet.clock())
        settings = AdmissionSettings.model_validate({"max_fill": None, "max_load": None, **limits})
        self.dispatcher = Dispatcher(
            [self.fleet.pool],
            self.fleet.load,
            owner="127.0.0.1:9002",
            rng=Random(1),
            clock=self.fleet.clock,
            admission=settings,
            line=line,
        )

    def place(self, tokens: int) -> Decision | Rejection:
        return self.dispatcher.place(Api.GENERATE, ids(tokens))

    def place_until_refused(self, tokens: int, most: int = 50) -> tuple[list[Decision], Rejection]:
        placed: list[Decision] = []
        for _ in range(most):
            found = self.place(tokens)
            if isinstance(found, Rejection):
                return placed, found
            placed.append(found)
        raise AssertionError(f"{most} requests were placed")


@pytest.mark.parametrize(
    ("limits", "tokens", "expected"),
    [
        pytest.param({"max_requests": 3}, 10, 6, id="requests"),
        pytest.param({"max_load": 2.0}, 10, 8, id="requests-by-what-runs"),
    ],
)
def test_a_full_fleet_refuses_with_429(limits: dict[str, Any], tokens: int, expected: int) -> None:
    """Two ranks take twice the limit of one; the refusal says when to come again."""
    placed, refusal = Small(**limits).place_until_refused(tokens)
    assert len(placed) == expected
    assert (refusal.status, refusal.reason) == (429, Reason.OVER_CAPACITY)
    assert dict(refusal.headers)["retry-after"]
    assert json.loads(refusal.body())["error"]["type"] == "rate_limit_error"


def test_tokens_are_limited_by_what_a_rank_holds() -> None:
    """Decode counts a thousand tokens for each request besides its prompt, so two fit into 4 x 1000 on each rank."""
    placed, refusal = Small(max_fill=4.0).place_until_refused(900)
    assert len(placed) == 4
    assert "decode" in refusal.message


def test_an_empty_rank_takes_whatever_fits_at_all() -> None:
    """A limit below one request's size would refuse it for ever."""
    small = Small(max_tokens=10)
    assert isinstance(small.place(900), Decision)
    assert isinstance(small.place(900), Decision)
    assert isinstance(small.place(900), Rejection)


def test_room_comes_back_with_the_end_of_a_request() -> None:
    """What was released may be filled again."""
    small = Small(max_requests=1)
    placed, _ = small.place_until_refused(10)
    assert placed[0].attempt is not None
    placed[0].attempt.end(small.fleet.clock())
    assert isinstance(small.place(10), Decision)


def test_a_prompt_longer_than_any_rank_is_refused_for_good() -> None:
    """Counted tokens are certain: 400 at once, as the other leg would wait for minutes."""
    small = Small()
    refusal = small.place(CAPACITY + 1)
    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (400, Reason.PROMPT_TOO_LONG)
    assert isinstance(small.place(CAPACITY), Decision)


@pytest.mark.parametrize(("text_bytes", "fits"), [(4 * CAPACITY * 3, True), (4 * CAPACITY * 5, False)])
def test_texts_are_refused_only_beyond_doubt(text_bytes: int, fits: bool) -> None:
    """An estimate may be wrong by a factor; only one that no error explains refuses."""
    found = Small().dispatcher.place(Api.GENERATE, json.dumps({"text": "x" * text_bytes}).encode())
    assert isinstance(found, Decision) is fits


def test_a_batch_is_not_too_long() -> None:
    """Its prompts take their turns."""
    found = Small().dispatcher.place(Api.GENERATE, json.dumps({"input_ids": [[1] * 700, [1] * 700]}).encode())
    assert isinstance(found, Decision)


def test_a_new_request_does_not_overtake_those_that_wait() -> None:
    """There is room, but somebody was there before."""
    line = WaitingLine(QueueSettings())
    small = Small(line)
    ticket = line.join("*", 0, lambda: None)
    assert ticket is not None
    found = small.place(10)
    assert isinstance(found, Rejection)
    assert found.wait is not None
    assert (found.wait.pool, found.wait.priority) == ("*", 0)
    assert isinstance(small.dispatcher.place(Api.GENERATE, ids(10), Circumstances(ticket=ticket)), Decision)


def test_the_bodys_priority_counts() -> None:
    """SGLang's own field; a greater one goes before those that wait."""
    line = WaitingLine(QueueSettings())
    small = Small(line)
    line.join("*", 0, lambda: None)
    body = json.dumps({"input_ids": [1], "priority": 1}).encode()
    assert isinstance(small.dispatcher.place(Api.GENERATE, body), Decision)
