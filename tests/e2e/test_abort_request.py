"""Clients end their requests by ``/abort_request``, with the ids that they have given to them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from e2e.stack import DECODE_RANKS, PATIENCE, Stack, run_stack
from patience import wait_for

SLOW = ("--time-scale", "1", *PATIENCE)
LONG = {"text": "y", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}, "stream": True}
FORMS: dict[str, dict[str, Any]] = {
    "mirrored": {"listen": {"workers": 2}},
    "sent in duplex": {"prefill_leg": "service", "envoy": {"body_mode": "full_duplex_streamed"}},
}


@pytest.fixture(scope="module", params=FORMS)
def running(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with run_stack(options=SLOW, **FORMS[request.param]) as stack:
        yield stack


@pytest.fixture
def stack(running: Stack) -> Iterator[Stack]:
    """Give a fleet with empty journals; in the end no reservation may be left."""
    running.forget()
    yield running
    running.service.wait_until_idle()


def abort(stack: Stack, rid: str, key: str = "") -> httpx.Response:
    headers = {"authorization": key} if key else {}
    return stack.client.post("/abort_request", json={"rid": rid}, headers=headers)


def outcomes(stack: Stack) -> list[tuple[str, str]]:
    found = [(each["outcome"], str(each["error"])) for each in stack.decodes[0].requests()]
    return sorted(found)


def active_streams(stack: Stack) -> float:
    lines = stack.service.metrics().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("dp_extproc_active_streams"))


def test_streams_end_at_the_id_of_their_client_in_every_worker_process(stack: Stack) -> None:
    """The engine ends the stream as SGLang does. Other ids end nothing, also if they begin alike."""
    with ExitStack() as clients:
        streams = [
            clients.enter_context(stack.client.stream("POST", "/generate", json=LONG | {"rid": rid}))
            for rid in ("mine-1", "mine-1", "mine-10", "mine-1")
        ]
        wait_for(lambda: len(stack.decodes[0].requests()) == len(streams))
        assert abort(stack, "mine").status_code == 200
        assert abort(stack, "mine-1").content == b""
        texts = [streams[index].read().decode() for index in (0, 1, 3)]
        assert [outcome for outcome, _ in outcomes(stack)] == ["aborted"] * 3 + ["running"]
        assert abort(stack, "mine-10").status_code == 200
        texts.append(streams[2].read().decode())

    assert all('"type":"abort"' in text.replace(" ", "") and text.endswith("data: [DONE]\n\n") for text in texts)
    assert outcomes(stack) == [("aborted", "Abort requested")] * 4


def test_whole_responses_and_batches_end_by_their_ids(stack: Stack) -> None:
    """Of a single id SGLang makes one for each prompt; either ends its prompts, and the others go on."""
    body = LONG | {"text": ["a", "b"], "stream": False, "rid": "batch"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(stack.client.post, "/generate", json=body)
        wait_for(lambda: len(stack.decodes[0].requests()) == 1)
        assert abort(stack, "batch_1").status_code == 200
        assert not answer.done()
        assert abort(stack, "batch").status_code == 200
        found = answer.result()

    assert found.status_code == 200
    assert [each["meta_info"]["finish_reason"]["type"] for each in found.json()] == ["abort", "abort"]


def test_an_abort_without_an_id_is_refused(stack: Stack) -> None:
    for body, status in (({}, 400), ({"rid": ""}, 400), ({"rid": 1}, 400), ({"abort_all": True}, 403)):
        assert stack.client.post("/abort_request", json=body).status_code == status, body
    assert abort(stack, "unknown").status_code == 200
    assert stack.received() == []


def test_a_request_that_waits_is_ended_by_its_id_and_by_no_other_client() -> None:
    """Where the service gets credentials, an id counts for those alone."""
    options = (*SLOW, "--max-total-tokens", "50000")
    sections: dict[str, Any] = {"admission": {"max_requests": 1}, "queue": {"max_wait": "15s", "max_depth": 2}}
    mine = {"authorization": "Bearer mine"}
    with run_stack(options=options, prefill_leg="service", **sections) as stack, ThreadPoolExecutor(3) as pool:
        sent = [
            pool.submit(stack.client.post, "/generate", json=LONG | {"rid": f"mine-{index}"}, headers=mine)
            for index in range(DECODE_RANKS + 1)
        ]
        wait_for(lambda: len(stack.decodes[0].requests()) == DECODE_RANKS)
        wait_for(lambda: active_streams(stack) == len(sent))
        for index in range(DECODE_RANKS + 1):
            assert abort(stack, f"mine-{index}", "Bearer other").status_code == 200
        assert not any(each.done() for each in sent)
        for index in reversed(range(DECODE_RANKS + 1)):
            abort(stack, f"mine-{index}", "Bearer mine")
        found = sorted((each.result() for each in sent), key=lambda each: each.status_code)

        assert [each.status_code for each in found] in ([200, 200, 200], [200, 200, 400])
        stack.service.wait_until_idle()
