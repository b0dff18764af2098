"""Clients that disconnect, aborts, and prompts that only a scheduler rejects: by release, read in SGLang's sources."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import FAST, PROMPTS
from patience import wait_for

ENDLESS: dict[str, dict[str, Any]] = {
    "/generate": {"sampling_params": {"max_new_tokens": 10_000_000}},
    "/v1/chat/completions": {"max_tokens": 10_000_000},
    "/v1/responses": {"max_output_tokens": 10_000_000},
}
LATER = 400
"""Tokens after a disconnect by which every release has aborted the request that aborts it at all: 4 s of steps."""


@pytest.fixture(scope="module", params=["0.5.16", "0.5.17", "0.5.19", "0.5.20"])
def version(request: pytest.FixtureRequest) -> str:
    """Return a release on either side of each change."""
    return str(request.param)


@pytest.fixture(scope="module")
def engine(version: str) -> Iterator[EngineProcess]:
    """Run a unified engine of the release."""
    with EngineProcess("unified", 1, "--time-scale", "0.1", "--sglang-version", version) as process:
        yield process


def leave(engine: EngineProcess, path: str, **more: Any) -> bool:
    """Read the first piece of a stream, disconnect, and return whether the request is aborted."""
    body = {**PROMPTS[path], **ENDLESS[path], **more, "stream": True}
    with loopback.client() as client, client.stream("POST", engine.url + path, json=body) as response:
        assert next(response.iter_raw())
    wait_for(lambda: engine.requests()[-1]["disconnected_at"])
    return is_aborted(engine)


def is_aborted(engine: EngineProcess) -> bool:
    """Return whether the last request ends before it generates many more tokens."""
    tokens = engine.requests()[-1]["legs"][0]["output_tokens"]

    def seen() -> list[bool]:
        record = engine.requests()[-1]
        aborted = record["outcome"] == "aborted"
        return [aborted] if aborted or record["legs"][0]["output_tokens"] > tokens + LATER else []

    return wait_for(seen)[0]


def abort(engine: EngineProcess, **what: Any) -> None:
    loopback.CLIENT.post(f"{engine.url}/abort_request", json=what).raise_for_status()


@pytest.mark.parametrize("path", ENDLESS)
def test_request_whose_client_left_is_aborted_unless_the_release_forgets_it(
    engine: EngineProcess, version: str, path: str
) -> None:
    """0.5.18 and 0.5.19 compute it to its end; until 0.5.16 only responses had no background task."""
    runs_on = version in {"0.5.18", "0.5.19"} or (version == "0.5.16" and path == "/v1/responses")

    assert leave(engine, path) is not runs_on
    abort(engine, abort_all=True)


def test_abort_reaches_a_request_as_long_as_its_stream_is_open(engine: EngineProcess, version: str) -> None:
    """After the close 0.5.18 and 0.5.19 know the id no more, and take it again."""
    body = {**PROMPTS["/generate"], **ENDLESS["/generate"], "stream": True, "rid": "a"}
    with loopback.client() as client, client.stream("POST", f"{engine.url}/generate", json=body) as response:
        abort(engine, rid="a")
        response.read()
    assert is_aborted(engine)
    if version in {"0.5.18", "0.5.19"}:
        assert not leave(engine, "/generate", rid="a")
        abort(engine, rid="a")
        assert not is_aborted(engine)
        abort(engine, abort_all=True)


@pytest.mark.parametrize(("version", "status"), [("0.5.19", 200), ("0.5.20", 400)])
def test_prefill_answers_for_a_prompt_that_its_scheduler_rejects(version: str, status: int) -> None:
    """Until 0.5.19 the end of the transfer overwrote the verdict; a token below the limit is served by all."""
    options = ("--sglang-version", version, "--max-total-tokens", "1000")
    with EngineProcess("prefill", 1, *FAST, *options) as prefill:
        answers = [
            httpx.post(
                f"{prefill.url}/generate",
                json={"input_ids": [1] * count, "bootstrap_host": "2.2.2.2", "bootstrap_room": 1},
                timeout=20,
            )
            for count in (993, 994)
        ]
        assert [each.status_code for each in answers] == [200, status]
        if status == 200:
            assert answers[1].json()["meta_info"]["prompt_tokens"] == 1
        else:
            assert "exceeds the maximum allowed length (994 tokens)" in answers[1].json()["error"]["message"]


def test_responses_take_tools_of_every_type() -> None:
    """Only models of the harmony format with a tool server refuse built-in tools."""
    with EngineProcess("prefill", 1, *FAST) as prefill:
        place = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 1}
        tools = [{"type": "web_search"}, {"type": "custom", "name": "x"}, {"type": "function", "name": "y"}]
        answer = httpx.post(f"{prefill.url}/v1/responses", json={"input": "x", "tools": tools, **place}, timeout=20)

        assert answer.status_code == 200
