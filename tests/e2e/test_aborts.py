"""Decode legs of releases that do not end a request when its stream is closed, through real Envoy."""

from collections.abc import Iterator
from typing import Any

import pytest

from e2e.stack import Stack, run_stack
from patience import wait_for

LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 5}}),
    "batch": ("/generate", {"text": ["hello", "world"], "sampling_params": {"max_new_tokens": 5}}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}),
}


@pytest.fixture(scope="module", params=["envoy", "service"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Run a fleet of 0.5.19, whose prefill legs Envoy or the service sends."""
    with run_stack("0.5.19", prefill_leg=request.param) as found:
        yield found


def aborts(stack: Stack) -> float:
    """Count the aborts that engines have answered."""
    lines = stack.service.metrics().splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith('dp_extproc_decode_aborts_total{outcome="answered"')
    )


@pytest.mark.parametrize("kind", LONG)
def test_decode_leg_of_a_failed_prefill_leg_is_aborted_before_it_is_closed(stack: Stack, kind: str) -> None:
    """Else it would wait for 300 s, with KV cache reserved. The next attempt serves the request."""
    path, body = LONG[kind]
    before = aborts(stack)
    stack.forget()
    for engine in stack.prefills:
        engine.fault(inference={"kind": "500", "times": 1})
    try:
        response = stack.client.post(path, json=body | {"model": "m", "stream": True})
    finally:
        for engine in stack.prefills:
            engine.heal()

    assert response.status_code == 200
    assert "abort" not in response.text
    (decode,) = stack.decodes
    legs = wait_for(lambda: [] if any(leg["outcome"] == "running" for leg in decode.requests()) else decode.requests())
    assert [(leg["outcome"], leg["error"]) for leg in legs] == [
        *[("aborted", "Abort requested")] * (len(legs) - 1),
        ("finished", None),
    ]
    assert len(legs) > 1
    assert aborts(stack) > before


def test_responses_that_are_no_stream_need_no_abort(stack: Stack) -> None:
    """For these every release looks every 4 s whether the client is still there."""
    path, body = LONG["chat"]
    before = aborts(stack)
    stack.forget()
    for engine in stack.prefills:
        engine.fault(inference={"kind": "500", "times": 1})
    response = stack.client.post(path, json=body | {"model": "m"})
    for engine in stack.prefills:
        engine.heal()

    assert response.status_code == 200
    assert aborts(stack) == before
