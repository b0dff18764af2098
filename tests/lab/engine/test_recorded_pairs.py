"""Answer legs as a real prefill and a real decode engine of SGLang 0.5.23 did, or never.

Both had two ranks, once as plain replicas and once with DP attention, and read ``x-override-*``. A request that the
real engines had not answered after 8 s counts as one that hangs.
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.ports import free_ports
from lab.engine.pair import Pair, run_pair
from lab.engine.recorded_shape import comparable, events_of, shape
from patience import wait_for

RECORDED = json.loads((Path(__file__).parent / "recorded" / "pairs.json").read_text())
SHAPES: dict[str, Any] = RECORDED["shapes"]
SIDES = ("prefill", "decode")
OPTIONS = ("--model", "tiny", "--header-overrides", "--timeout-waiting", "1000000", "--timeout-bootstrap", "1000000")


@pytest.fixture(scope="module")
def plain() -> Iterator[Pair]:
    """Run a pair of plain replicas without timeouts."""
    with run_pair("0.5.23", *OPTIONS, dp_attention=False, ranks=2) as pair:
        yield pair


@pytest.fixture(scope="module")
def attention() -> Iterator[Pair]:
    """Run a pair with DP attention without timeouts."""
    with run_pair("0.5.23", *OPTIONS, ranks=2) as pair:
        yield pair


def cases_of(kind: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in RECORDED[kind]]


@dataclass(slots=True)
class Sent:
    """A leg under way."""

    side: str
    expected: dict[str, Any]
    engine: EngineProcess
    head: Event = field(default_factory=Event)
    answer: Future[httpx.Response] = field(default_factory=Future)

    def noted(self) -> dict[str, Any]:
        """Return the journal's entry, which was empty before: call it before another request is sent there."""
        return wait_for(self.engine.requests)[0]

    def rid(self) -> str:
        """Return the id of the request in its scheduler."""
        return str(wait_for(lambda: self.noted()["legs"])[0]["rid"])

    def is_waiting(self) -> bool:
        """Whether it has reached its scheduler, and waits there for the other side."""
        return any(leg["stage"] in {"bootstrap", "transfer"} for leg in self.noted()["legs"])


def send(pair: Pair, case: dict[str, Any], side: str, room: int) -> Sent:
    """Send one leg of a case."""
    expected, engine = case[side], getattr(pair, side)
    values = {"ROOM": room, "PORT": pair.prefill.bootstrap_port, "DEAD": free_ports(1)[0]}
    body = {name: values.get(str(value), value) for name, value in expected["body"].items()}
    if body.pop("MEETING", None):
        body |= pair.meeting(room)
    headers = {name: str(values.get(value, value)) for name, value in expected.get("headers", {}).items()}
    sent = Sent(side, expected, engine)
    json_body = {**RECORDED["prompts"][case["path"]], **body}

    def read() -> httpx.Response:
        with pair.client.stream("POST", engine.url + case["path"], json=json_body, headers=headers) as response:
            sent.head.set()
            response.read()
        return response

    engine.forget()
    sent.answer = pair.pool.submit(read)
    return sent


@pytest.mark.parametrize("case", cases_of("plain"))
def test_plain_replicas_answer_as_recorded(plain: Pair, case: dict[str, Any]) -> None:
    """Status, errors, members and ranks are the same on both sides; the head comes at the same time, or never."""
    replay(plain, case)


@pytest.mark.parametrize("case", cases_of("attention"))
def test_dp_attention_answers_as_recorded(attention: Pair, case: dict[str, Any]) -> None:
    """Everything is compared as for plain replicas."""
    replay(attention, case)


def replay(pair: Pair, case: dict[str, Any]) -> None:
    room = pair.room(case["room"])
    sides = sorted((side for side in SIDES if side in case), key=lambda side: side == case.get("late"))
    legs: list[Sent] = []
    for side in sides:
        if side == case.get("late"):
            check_head(pair, legs[0])
        legs.append(send(pair, case, side, room))

    for leg in legs:
        if "hangs" not in leg.expected:
            check_answer(pair, case, leg, room)
    hanging = [(leg, leg.rid()) for leg in legs if "hangs" in leg.expected]
    for leg, rid in hanging:
        check_waiting(pair, leg, rid)


def check_head(pair: Pair, leg: Sent) -> None:
    """Check the head of a leg whose other side is late."""
    wait_for(leg.is_waiting)
    if leg.expected.get("head") == "at once":
        assert leg.head.wait(10)
    serve_another(pair)
    assert leg.head.is_set() == (leg.expected.get("head") == "at once")


def check_answer(pair: Pair, case: dict[str, Any], leg: Sent, room: int) -> None:
    expected, response = leg.expected, leg.answer.result(30)

    assert response.status_code == expected["status"], response.text
    assert response.headers["content-type"] == expected.get("type", "application/json")
    assert response.headers["vary"] == "Origin"
    if "error" in expected:
        assert comparable(response.text).replace(str(room), "ROOM") == comparable(expected["error"])
    elif "type" in expected:
        assert shape(events_of(response.text)) == SHAPES[f"{case['path']} {leg.side} stream"]
    else:
        assert shape(response.json()) == SHAPES[f"{case['path']} {leg.side}"]
    if "rank" in expected:
        assert leg.noted()["rank"] == expected["rank"]


def check_waiting(pair: Pair, leg: Sent, rid: str) -> None:
    """Check that a leg still waits after a later pair has been served, and then end it."""
    serve_another(pair)
    assert leg.head.is_set() == (leg.expected.get("head") == "at once")
    assert not leg.answer.done()
    pair.client.post(f"{leg.engine.url}/abort_request", json={"rid": rid})
    leg.answer.result(30)


def serve_another(pair: Pair) -> None:
    """Send both legs of a request that goes well: time enough for other answers to come."""
    ranks = {"routed_dp_rank": 1, "disagg_prefill_dp_rank": 1}
    answers = pair.send("/generate", pair.meeting(pair.room(1)), ranks, ranks)
    assert [answer.status_code for answer in answers] == [200, 200]
