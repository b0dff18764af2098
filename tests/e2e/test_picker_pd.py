"""Prefill and decode behind any gateway: the service sends the prefill leg, and the gateway the decode leg."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.legs import assert_legs
from e2e.picker import Gateways, Mode, run_gateways
from e2e.stack import EVIL, Stack

DUPLEX, BUFFERED, NONE = "FULL_DUPLEX_STREAMED", "BUFFERED", "NONE"
MODES = (
    Mode(DUPLEX, NONE),
    Mode(BUFFERED, NONE, by_header=True),
    Mode(DUPLEX, DUPLEX, by_header=True),
    Mode(BUFFERED, DUPLEX),
    Mode(BUFFERED, BUFFERED),
)
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
GENERATE: dict[str, Any] = {"text": "hi", "sampling_params": {"max_new_tokens": 3}}


@pytest.fixture(scope="module")
def gateways() -> Iterator[Gateways]:
    section = {"picker": {"hold": "5s"}, "supervision": {"mode": "first_event", "prefill_timeout": "2s"}}
    with run_gateways(MODES, [section]) as gateways:
        yield gateways


@pytest.fixture(params=MODES, ids=str)
def stack(request: pytest.FixtureRequest, gateways: Gateways) -> Iterator[Stack]:
    stack = gateways.of(request.param)
    stack.forget()
    yield stack
    for engine in (*stack.prefills, *stack.decodes):
        engine.heal()
    stack.service.wait_until_idle()


@pytest.mark.parametrize(
    ("path", "body", "batch"),
    [
        ("/v1/chat/completions", {**EVIL, **CHAT}, None),
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}, None),
        ("/generate", {**GENERATE, "stream": True}, None),
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


def test_large_bodies_arrive_on_both_legs(stack: Stack) -> None:
    """A body of many chunks arrives whole, with the routing fields of its leg."""
    sent = {**CHAT, "padding": "x" * (1 << 20)}
    response = stack.client.post("/v1/chat/completions", json=sent)
    assert response.status_code == 200, response.text
    legs = stack.legs()

    assert [leg["outcome"] for leg in legs] == ["finished", "finished"]
    assert all(0 < leg["body_length"] - len(json.dumps(sent, separators=(",", ":"))) < 400 for leg in legs)
