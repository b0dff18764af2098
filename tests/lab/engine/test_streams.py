"""Test when headers come, how streams fail, what happens when a client leaves, and the official client libraries."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import anthropic
import httpx
import openai
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import PROMPTS, Pair, run_pair
from patience import wait_for

IMMEDIATE = ["/generate", "/v1/responses", "/v1/messages"]
KICK_STARTED = ["/v1/completions", "/v1/chat/completions"]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Run a pair without timeouts."""
    with run_pair("0.5.23", "--timeout-waiting", "1000000", "--timeout-bootstrap", "1000000") as pair:
        yield pair


@pytest.fixture(scope="module")
def before_kick_start() -> Iterator[Pair]:
    """Run a pair of the last release without a kick-start, without timeouts."""
    with run_pair("0.5.9", "--timeout-waiting", "1000000") as pair:
        yield pair


@pytest.fixture(scope="module")
def impatient() -> Iterator[Pair]:
    """Run a pair whose decode gives up quickly."""
    with run_pair("0.5.23") as pair:
        yield pair


@pytest.fixture(scope="module")
def unified() -> Iterator[EngineProcess]:
    """Run an engine that computes a prompt in one step, however long."""
    with EngineProcess("unified", 2, "--time-scale", "0.01", "--chunked-prefill-size", "-1") as engine:
        yield engine


@pytest.mark.parametrize("path", IMMEDIATE)
def test_headers_come_at_once_on_some_paths(pair: Pair, path: str) -> None:
    """They answer 200 before the result is known, even while prefill has not begun."""
    common = pair.meeting(pair.room())
    body = {**PROMPTS[path], **common, "stream": True}
    with pair.client.stream("POST", pair.decode.url + path, json=body) as decode:
        assert decode.status_code == 200
        assert decode.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert pair.decode.requests()[-1]["outcome"] == "running"
        assert pair.post(pair.prefill, path, **common).result().status_code == 200

        assert decode.read()
    assert pair.decode.requests()[-1]["outcome"] == "finished"


@contextmanager
def waiting_stream(pair: Pair, path: str) -> Iterator[Event]:
    """Stream from decode, with an event for its headers; prefill begins only afterwards, and the stream ends well."""
    common = pair.meeting(pair.room())
    body = {**PROMPTS[path], **common, "stream": True}
    headers = Event()

    def read() -> bytes:
        with pair.client.stream("POST", pair.decode.url + path, json=body) as decode:
            headers.set()
            return decode.read()

    pair.decode.forget()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read)
        wait_for(pair.decode.requests)
        yield headers
        assert pair.post(pair.prefill, path, **common).result().status_code == 200
        assert stream.result().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", KICK_STARTED)
def test_headers_come_with_the_first_chunk(pair: Pair, path: str) -> None:
    """Completions and chat hold their headers until prefill and transfer are over."""
    with waiting_stream(pair, path) as headers:
        other = pair.meeting(pair.room())  # one that is served meanwhile: time enough for headers to come
        assert pair.send("/generate", other)[1].status_code == 200
        assert not headers.is_set()


@pytest.mark.parametrize("path", KICK_STARTED)
def test_headers_came_at_once_until_0_5_9(before_kick_start: Pair, path: str) -> None:
    """There was no kick-start then."""
    with waiting_stream(before_kick_start, path) as headers:
        assert headers.wait(10)


@pytest.mark.parametrize("path", KICK_STARTED)
def test_failure_in_an_openai_stream_is_its_only_event(impatient: Pair, path: str) -> None:
    """The status is 200."""
    answer = impatient.post(impatient.decode, path, **impatient.meeting(impatient.room()), stream=True).result()

    first, done, _ = answer.text.split("\n\n")
    error = json.loads(first.removeprefix("data: "))["error"]
    assert answer.status_code == 200
    assert done == "data: [DONE]"
    assert error.pop("message").startswith("Decode transfer failed for request rank=")
    assert error == {"object": "error", "type": "INTERNAL_SERVER_ERROR", "param": None, "code": 500}


def test_failure_in_a_generate_stream_is_an_abort(impatient: Pair) -> None:
    """It is an ordinary event whose finish_reason is an abort with a status."""
    answer = impatient.post(impatient.decode, "/generate", **impatient.meeting(impatient.room()), stream=True).result()

    first, done, _ = answer.text.split("\n\n")
    reason = json.loads(first.removeprefix("data: "))["meta_info"]["finish_reason"]
    assert answer.status_code == 200
    assert done == "data: [DONE]"
    assert (reason["type"], reason["status_code"]) == ("abort", 500)


def test_failures_have_the_shape_of_their_api(impatient: Pair) -> None:
    """Messages mask the reason; responses nest it; both report it inside a stream as their APIs do."""

    def fail(path: str, **body: Any) -> httpx.Response:
        return impatient.post(impatient.decode, path, **impatient.meeting(impatient.room()), **body).result()

    masked = {"type": "error", "error": {"type": "api_error", "message": "Internal server error"}}
    assert (answer := fail("/v1/messages")).status_code == 500
    assert answer.json() == masked
    assert fail("/v1/messages", stream=True).text == f"event: error\ndata: {compact(masked)}\n\n"
    assert (answer := fail("/v1/responses")).status_code == 500
    assert answer.json()["error"]["message"].startswith("Decode transfer failed")
    assert fail("/v1/responses", stream=True).text.split("\n\n")[-2].startswith("event: response.failed\n")


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streaming"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/messages"])
def test_request_is_aborted_if_its_client_leaves(pair: Pair, path: str, stream: bool) -> None:
    """Its KV room is free again, and prefill's client gets no message."""
    body = {**PROMPTS[path], **pair.meeting(pair.room()), "stream": stream}

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            request = asyncio.ensure_future(client.post(pair.decode.url + path, json=body))
            await asyncio.to_thread(wait_for, lambda: running(pair.decode))
            request.cancel()

    pair.decode.forget()
    asyncio.run(leave())
    request = wait_for(lambda: [each for each in pair.decode.requests() if each["outcome"] != "running"])[0]
    assert (request["outcome"], request["error"]) == ("aborted", "client disconnected")
    load = httpx.get(f"{pair.decode.url}/v1/loads").json()["loads"][request["rank"]]
    wait_for(lambda: load["num_used_tokens"] == 0 or loads_of(pair.decode, request["rank"])["num_used_tokens"] == 0)


def loads_of(engine: EngineProcess, rank: int) -> dict[str, Any]:
    page: dict[str, Any] = httpx.get(f"{engine.url}/v1/loads").json()["loads"][rank]
    return page


def test_abort_request_matches_by_prefix(pair: Pair) -> None:
    """The id has to be known exactly, then everything that begins with it is aborted."""
    for rid in ("a-1", "a-10", "b-1"):
        pair.post(pair.decode, "/generate", **pair.meeting(pair.room()), rid=rid)
    wait_for(lambda: {"a-1", "a-10", "b-1"} <= running(pair.decode))
    for rid in ("a", "unknown"):
        assert httpx.post(f"{pair.decode.url}/abort_request", json={"rid": rid}).status_code == 200
    assert {"a-1", "a-10", "b-1"} <= running(pair.decode)
    httpx.post(f"{pair.decode.url}/abort_request", json={"rid": "a-1"})

    wait_for(lambda: not {"a-1", "a-10"} & running(pair.decode))
    assert "b-1" in running(pair.decode)
    httpx.post(f"{pair.decode.url}/abort_request", json={"abort_all": True})
    wait_for(lambda: not running(pair.decode))


def running(engine: EngineProcess) -> set[str]:
    return {leg["rid"] for each in engine.requests() if each["outcome"] == "running" for leg in each["legs"]}


def test_openai_client_works(unified: EngineProcess) -> None:
    """Chat, completions and responses, streaming and not, with usage."""
    messages: Any = [{"role": "user", "content": "hello"}]
    with openai.OpenAI(base_url=f"{unified.url}/v1", api_key="key", max_retries=0) as client:
        whole = client.chat.completions.create(model="m", messages=messages, max_completion_tokens=5)
        chunks = list(
            client.chat.completions.create(
                model="m", messages=messages, max_tokens=5, stream=True, stream_options={"include_usage": True}
            )
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert whole.usage is not None
        assert "".join(pieces) == whole.choices[0].message.content
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 5
        assert client.completions.create(model="m", prompt="x", max_tokens=2).choices[0].text
        assert client.models.list().data[0].id == "strict-engine"
        answer = client.responses.create(model="m", input="hello", max_output_tokens=4)
        assert answer.usage is not None
        assert answer.usage.output_tokens == 4
        with client.responses.stream(model="m", input="hello", max_output_tokens=4) as stream:
            kinds = [event.type for event in stream]
            text = stream.get_final_response().output_text
        assert kinds.count("response.output_text.delta") == 4
        assert text == answer.output_text


def test_anthropic_client_works(unified: EngineProcess) -> None:
    """Messages, streaming and not, with usage."""
    messages: Any = [{"role": "user", "content": "hello"}]
    with anthropic.Anthropic(base_url=unified.url, api_key="key", max_retries=0) as client:
        whole = client.messages.create(model="m", max_tokens=4, messages=messages, system="Be brief.")
        with client.messages.stream(model="m", max_tokens=4, messages=messages, system="Be brief.") as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens == 4
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.stop_reason == whole.stop_reason == "max_tokens"


@pytest.mark.parametrize(
    ("tokens", "chunks"), [(1, [1]), (4, [1, 3]), (9, [1, 4, 4]), (10, [1, 4, 4, 1])], ids=["1", "4", "9", "10"]
)
def test_tokens_come_in_chunks_of_the_interval(tokens: int, chunks: list[int]) -> None:
    """The first token comes alone, so that it is not held up; the last chunk may be shorter."""
    with (
        EngineProcess("unified", 1, "--time-scale", "0.01", "--stream-interval", "4") as engine,
        openai.OpenAI(base_url=f"{engine.url}/v1", api_key="key", max_retries=0) as client,
    ):
        stream = client.completions.create(model="m", prompt="hello", max_tokens=tokens, stream=True)
        assert [len(chunk.choices[0].text.split()) for chunk in stream] == chunks


@pytest.mark.parametrize("megabytes", [1, 60])
def test_large_body_is_kept_by_digest(unified: EngineProcess, megabytes: int) -> None:
    """A body of many megabytes is read, recorded by digest and ends, and can be fetched."""
    # in a key that is not read: it is not to be computed, too
    content = b'{"text":"x","padding":"' + b"x" * (megabytes << 20) + b'","sampling_params":{"max_new_tokens":0}}'
    headers = {"content-type": "application/json"}
    unified.forget()
    with loopback.client(timeout=60) as client:
        assert client.post(f"{unified.url}/generate", content=content, headers=headers).status_code == 200
        noted = unified.requests()[0]
        assert noted["body"] is None
        assert noted["body_length"] == len(content)
        assert noted["body_tail"].endswith('"sampling_params":{"max_new_tokens":0}}')
        assert client.get(f"{unified.url}/debug/requests/{noted['number']}/body").content == content
