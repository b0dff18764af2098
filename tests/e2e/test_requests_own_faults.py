"""Requests that engines fail at by the request's own fault, and requests that engines take although they look odd."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.stack import Stack, body_of, run_stack
from patience import wait_for

TEXT = {"model": "m", "prompt": "a"}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with run_stack("0.5.21", prefills=3) as running:
        yield running


def test_request_that_two_engines_answer_alike_is_not_tried_a_third_time(stack: Stack) -> None:
    """It ejects no engine, and the client gets the text of the second one."""
    stack.forget()
    for engine in stack.prefills:
        engine.fault(inference="500")
    responses = [stack.client.post("/v1/completions", json=TEXT) for _ in range(4)]
    for engine in stack.prefills:
        engine.heal()
    metrics = stack.service.metrics()

    assert [response.status_code for response in responses] == [502] * 4
    assert all("a fault is switched on" in response.text for response in responses)
    assert sum(len(engine.requests()) for engine in stack.prefills) == 8
    assert 'dp_extproc_leg_failures_total{leg="prefill",reason="failed_alike",retried="no"} 4.0' in metrics
    ejected = [line for line in metrics.splitlines() if line.startswith("dp_extproc_endpoint_ejected{")]
    assert ejected
    assert all(line.endswith(" 0.0") for line in ejected)


def test_engine_that_alone_answers_500_is_ejected(stack: Stack) -> None:
    """Its failures count, because the next attempts succeed."""
    failing = stack.prefills[0]
    failing.fault(inference="500")

    def is_ejected() -> bool:
        assert stack.client.post("/v1/completions", json=TEXT).status_code == 200
        ejected = [line for line in stack.service.metrics().splitlines() if "endpoint_ejected{" in line]
        return any(str(failing.port) in line and line.endswith(" 1.0") for line in ejected)

    wait_for(is_ejected)
    failing.heal()


@pytest.mark.parametrize(
    "body",
    [
        {"text": ["a"], "sampling_params": []},
        {"input_embeds": []},
        {"text": "x", "input_ids": [[1, 2], [3]]},
    ],
)
def test_mistake_that_engines_answer_with_500_reaches_none(stack: Stack, body: dict[str, Any]) -> None:
    """The client gets a 400 that names the field."""
    stack.forget()
    response = stack.client.post("/generate", json=body)

    assert (response.status_code, stack.received()) == (400, [])


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", b'"prompt":"a","stream":"true","max_tokens":2.0,"n":1.0,"priority":"5"'),
        ("/v1/completions", b'"prompt":"a","stream":1,"max_tokens":"2","n":"1"'),
        ("/v1/completions", b'"prompt":"a","stream":0,"max_tokens":2e0'),
        ("/generate", b'"text":"a","stream":"yes","n":7,"max_tokens":"x","sampling_params":{"max_new_tokens":2}'),
    ],
)
def test_odd_value_is_served_as_the_engine_reads_it(stack: Stack, path: str, fields: bytes) -> None:
    """The decode engine gets it byte for byte, and streams or does not."""
    stack.forget()
    headers = {"content-type": "application/json"}
    response = stack.client.post(path, content=b'{"model":"m",' + fields + b"}", headers=headers)
    prefill, decode = stack.legs()
    given = json.loads(b"{" + fields + b"}")
    streams = given["stream"] != 0

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream") == streams
    assert body_of(prefill)["stream"] is False
    assert {name: body_of(decode)[name] for name in given} == given
    (raw,) = (request["body"] for request in (decode,))
    assert fields.partition(b',"stream":')[0] in raw.encode()
