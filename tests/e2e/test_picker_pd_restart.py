"""The service stops, dies, and names further endpoints, with prefill legs of its own in flight."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from e2e.picker import Gateways, Mode, run_gateways
from e2e.stack import Stack
from patience import wait_for

HEADERS = Mode("FULL_DUPLEX_STREAMED", "NONE")
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
STREAM = {"text": "hi", "sampling_params": {"max_new_tokens": 3}, "stream": True}


@pytest.fixture(scope="module")
def gateways() -> Iterator[Gateways]:
    # Load is read so rarely that a decode engine which refuses connections is still picked.
    section = {"picker": {"hold": "5s", "fallbacks": 1}, "load": {"interval": "10s", "stale_after": "60s"}}
    with run_gateways([HEADERS], [section], decodes=2) as gateways:
        yield gateways


@pytest.fixture
def stack(gateways: Gateways) -> Iterator[Stack]:
    stack = gateways.of(HEADERS)
    stack.forget()
    yield stack
    for engine in (*stack.prefills, *stack.decodes):
        engine.heal()
    if not stack.service.is_running:
        stack.service.start()
        stack.service.wait_until_listening()
        stack.service.wait_until_fresh()


def test_refused_connection_leads_to_the_next_decode_endpoint(stack: Stack) -> None:
    """Which has the rank that the body names. There is one prefill leg for each request."""
    dead, alive = stack.decodes
    dead.fault(inference="refuse")
    answers = [stack.client.post("/v1/chat/completions", json=CHAT) for _ in range(8)]

    assert {answer.status_code for answer in answers} == {200}
    named = [leg["headers"]["x-gateway-destination-endpoint"].split(",") for leg in alive.requests()]
    assert {len(each) for each in named} == {2}
    assert {each[0] for each in named} == {engine.url.removeprefix("http://") for engine in (dead, alive)}
    assert [leg["outcome"] for leg in stack.prefills[0].requests()] == ["finished"] * 8


def test_stop_waits_for_prefill_legs(stack: Stack) -> None:
    """And for streams whose headers are held. Nothing is lost."""
    stack.prefills[0].fault(inference={"kind": "slow", "seconds": 1.5})
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(stack.client.post, path, json=body)
            for path, body in (("/v1/chat/completions", CHAT), ("/generate", STREAM))
        ]
        wait_for(lambda: len(stack.prefills[0].requests()) == 2)
        assert not any(each.done() for each in asked)
        assert stack.service.stop() == 0
        answers = [each.result() for each in asked]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[1].text.endswith("data: [DONE]\n\n")


def test_crash_costs_an_error_at_once(stack: Stack) -> None:
    """The gateway fails closed, and ends decode; the connection of the prefill leg is gone with the process."""
    stack.prefills[0].fault(inference="hang")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(stack.client.post, "/v1/chat/completions", json=CHAT)
        wait_for(lambda: any(engine.requests() for engine in stack.decodes) and stack.prefills[0].requests())
        stack.service.stop(signal.SIGKILL)
        answer = asked.result()

    assert answer.status_code == 500
    engines = (*stack.prefills, *stack.decodes)
    wait_for(lambda: {leg["outcome"] for each in engines for leg in each.requests()} == {"aborted"})
