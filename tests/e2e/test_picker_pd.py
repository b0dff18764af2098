"""Prefill and decode behind any gateway: the service sends the prefill leg, and the gateway the decode leg.

If either leg fails, the client gets a clean error while that is possible, and no leg goes on alone.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import httpx
import pytest

from dp_extproc.lab.testbed.engine import EngineProcess
from e2e.legs import assert_legs
from e2e.picker import Gateways, Mode, run_gateways
from e2e.stack import EVIL, Stack
from patience import wait_for

DUPLEX, BUFFERED, NONE = "FULL_DUPLEX_STREAMED", "BUFFERED", "NONE"
EACH_MODE: Final = (
    Mode(DUPLEX, NONE),
    Mode(BUFFERED, NONE, by_header=True),
    Mode(DUPLEX, DUPLEX, by_header=True),
    Mode(BUFFERED, DUPLEX),
    Mode(BUFFERED, BUFFERED),
)
"""Every mode of bodies, with both ways of routing."""
BY_HEADERS, BY_EVENTS = EACH_MODE[0], Mode(BUFFERED, DUPLEX, by_header=True, message_timeout="0.2s")
"""Gateways that show the service the headers of a response alone, and its events, too."""
SHORT_HOLD = Mode(DUPLEX, NONE, service=1, message_timeout="1s")
SKIPS = Mode(DUPLEX, NONE, headers="SKIP", service=1)
HOLD: Final = "200ms"
QUICK: Final = {
    "load": {"stale_after": "20s", "timeout": "5s"},
    "supervision": {"mode": "first_event", "prefill_timeout": "2s", "first_token_timeout": "5s"},
    # every request has to meet the fault
    "outlier_detection": {"consecutive_failures": 1000},
}
CHAT: Final[dict[str, Any]] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
GENERATE: Final[dict[str, Any]] = {"text": "hi", "sampling_params": {"max_new_tokens": 3}, "stream": True}
KINDS: Final = {"/v1/chat/completions": CHAT, "/generate": GENERATE}
"""A response that begins with its first token, and a stream that begins before prefill is done."""


@pytest.fixture(scope="module")
def gateways() -> Iterator[Gateways]:
    services = [{**QUICK, "picker": {"hold": "5s"}}, {**QUICK, "picker": {"hold": HOLD}}]
    with run_gateways([*EACH_MODE, BY_EVENTS, SHORT_HOLD, SKIPS], services) as gateways:
        yield gateways


@pytest.fixture
def stack(request: pytest.FixtureRequest, gateways: Gateways) -> Iterator[Stack]:
    stack = gateways.of(request.param)
    stack.forget()
    yield stack
    for engine in (*stack.prefills, *stack.decodes):
        engine.heal()
    wait_for(lambda: not running(stack))
    stack.service.wait_until_idle()


def running(stack: Stack) -> list[str]:
    """List the roles of the legs that engines still run."""
    engines: list[EngineProcess] = [*stack.prefills, *stack.decodes]
    return [each.role for each in engines for leg in each.requests() if leg["outcome"] == "running"]


def ask(stack: Stack, path: str) -> httpx.Response:
    return stack.client.post(path, json=KINDS[path])


def ask_all(stack: Stack) -> list[httpx.Response]:
    """Send a request of each kind, all at the same time."""
    with ThreadPoolExecutor(len(KINDS)) as threads:
        return list(threads.map(partial(ask, stack), KINDS))


def count(stack: Stack, name: str) -> float:
    """Add up a metric over its labels."""
    lines = stack.service.metrics().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


EACH: Final = pytest.mark.parametrize("stack", EACH_MODE, indirect=True, ids=str)
BOTH: Final = pytest.mark.parametrize("stack", [BY_HEADERS, BY_EVENTS], indirect=True, ids=["NONE", "DUPLEX"])


@EACH
@pytest.mark.parametrize(
    ("path", "body", "batch"),
    [
        ("/v1/chat/completions", {**EVIL, **CHAT}, None),
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}, None),
        ("/generate", GENERATE, None),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3}, 2),
    ],
    ids=["chat", "stream", "generate stream", "batch"],
)
def test_both_legs_meet_on_the_picked_ranks(stack: Stack, path: str, body: dict[str, Any], batch: int | None) -> None:
    """The engines get the fields of a mirrored request, and none of the headers between gateway and service."""
    response = stack.client.post(path, json=body, headers={"x-data-parallel-rank": "1", "x-override-rid": "evil"})

    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    assert_legs(stack, body, path, batch=batch)


@EACH
def test_large_bodies_arrive_on_both_legs(stack: Stack) -> None:
    """A body of many chunks arrives whole, with the routing fields of its leg."""
    sent = {**CHAT, "padding": "x" * (1 << 20)}
    response = stack.client.post("/v1/chat/completions", json=sent)
    assert response.status_code == 200, response.text
    legs = stack.legs()

    assert [leg["outcome"] for leg in legs] == ["finished", "finished"]
    assert all(0 < leg["body_length"] - len(json.dumps(sent, separators=(",", ":"))) < 400 for leg in legs)


OF_PREFILL: Final = {
    "refuses connections": ("refuse", 502, "prefill_failed"),
    "resets": ("reset", 502, "prefill_failed"),
    "answers 500": ("500", 502, "prefill_failed"),
    "answers no HTTP": ("noise", 502, "prefill_failed"),
    "gives up": ("fail", 502, "prefill_failed"),
    "answers 400": ("400", 400, None),
    "hangs": ("hang", 504, "prefill_timeout"),
}


@BOTH
@pytest.mark.parametrize(("fault", "status", "reason"), OF_PREFILL.values(), ids=OF_PREFILL)
def test_failure_of_prefill_is_a_clean_error(stack: Stack, fault: str, status: int, reason: str | None) -> None:
    """Also of a stream that the decode engine has begun with 200. The decode leg ends with it."""
    stack.prefills[0].fault(inference=fault)

    for response in ask_all(stack):
        assert (response.status_code, response.headers.get("x-dp-extproc-reason")) == (status, reason), response.text
        assert response.headers.get("retry-after") == ("0" if reason else None)
    wait_for(lambda: not running(stack))
    assert {leg["outcome"] for leg in stack.decodes[0].requests()} <= {
        "aborted",
        "failed",
    }


@BOTH
@pytest.mark.parametrize("fault", ["400", "500"])
def test_error_of_decode_ends_the_prefill_leg(stack: Stack, fault: str) -> None:
    """The client gets the error of the engine as it is."""
    stack.decodes[0].fault(inference=fault)
    response = ask(stack, "/generate")

    assert (response.status_code, response.headers.get("x-dp-extproc-reason")) == (int(fault), None)
    wait_for(lambda: not running(stack))
    assert [leg["outcome"] for leg in stack.prefills[0].requests()] in (["aborted"], [])


@pytest.mark.parametrize(
    ("stack", "status", "reason"),
    [(BY_HEADERS, 504, "prefill_timeout"), (BY_EVENTS, 502, "decode_failed")],
    indirect=["stack"],
    ids=["NONE", "DUPLEX"],
)
def test_error_behind_status_200_becomes_a_clean_error(stack: Stack, status: int, reason: str) -> None:
    """At once where its event is seen; else when prefill has waited for decode in vain."""
    stack.decodes[0].fault(inference="fail")
    response = ask(stack, "/generate")

    assert (response.status_code, response.headers.get("x-dp-extproc-reason")) == (status, reason)


@BOTH
def test_slow_prefill_delays_the_headers_of_a_stream(stack: Stack) -> None:
    """For longer than the gateway's timer for messages, where response bodies are in full duplex."""
    stack.prefills[0].fault(inference={"kind": "slow", "seconds": 0.6})
    since = time.monotonic()
    with stack.client.stream("POST", "/generate", json=GENERATE) as response:
        assert response.status_code == 200
        assert time.monotonic() - since >= 0.6
        assert response.read().endswith(b"data: [DONE]\n\n")


@BOTH
def test_leaving_client_ends_both_legs(stack: Stack) -> None:
    """The gateway ends decode, and the service prefill."""
    stack.prefills[0].fault(inference="hang")
    with ThreadPoolExecutor(1) as thread:
        with httpx.Client(base_url=stack.client.base_url, trust_env=False) as client:
            asked = thread.submit(client.post, "/v1/chat/completions", json=CHAT)
            wait_for(lambda: stack.prefills[0].requests() and stack.decodes[0].requests())
        assert isinstance(asked.exception(), httpx.TransportError)
    wait_for(lambda: not running(stack))

    for engine in (*stack.prefills, *stack.decodes):
        assert [leg["outcome"] for leg in engine.requests()] == ["aborted"]


@pytest.mark.parametrize("stack", [SKIPS], indirect=True, ids=["SKIP"])
class TestGatewayWithoutResponseHeaders:
    """It ends its stream to the service as soon as the request has passed."""

    def test_requests_are_answered(self, stack: Stack) -> None:
        """The prefill leg goes on, the case is counted, and logged once."""
        name = "dp_extproc_gateway_without_responses_total"
        before = count(stack, name)
        answers = [answer for _ in range(3) for answer in ask_all(stack)]

        assert {answer.status_code for answer in answers} == {200}
        wait_for(lambda: count(stack, name) == before + len(answers))
        assert stack.service.log().count("set response_header_mode to SEND") == 1

    @pytest.mark.parametrize("fault", ["500", "hang"])
    def test_failure_of_prefill_ends_the_decode_leg(self, stack: Stack, fault: str) -> None:
        """By its id, as no error can reach the client any more. Otherwise it would wait for 300 s."""
        before = count(stack, "dp_extproc_decode_aborts_total")
        stack.prefills[0].fault(inference=fault)

        for response in ask_all(stack):
            assert (response.status_code, "abort" in response.text) == (200, True)
        assert count(stack, "dp_extproc_decode_aborts_total") >= before + len(KINDS)


@pytest.mark.parametrize("stack", [SHORT_HOLD], indirect=True, ids=["hold"])
class TestHold:
    """The time for which response headers may be held is bounded by the gateway's timer for messages."""

    def test_response_is_let_go_in_time(self, stack: Stack) -> None:
        """The gateway would answer 504 after its own timer."""
        before = count(stack, "dp_extproc_hold_given_up_total")
        stack.prefills[0].fault(inference={"kind": "slow", "seconds": 1.5})
        since = time.monotonic()
        with stack.client.stream("POST", "/generate", json=GENERATE) as response:
            assert response.status_code == 200
            assert time.monotonic() - since < 1.4
            assert response.read().endswith(b"data: [DONE]\n\n")

        assert count(stack, "dp_extproc_hold_given_up_total") == before + 1

    def test_failure_after_it_ends_the_decode_leg(self, stack: Stack) -> None:
        """The stream ends early, but it ends."""
        stack.prefills[0].fault(inference="hang")
        response = ask(stack, "/generate")

        assert (response.status_code, "abort" in response.text) == (200, True)
        assert count(stack, "dp_extproc_decode_aborts_total") > 0
