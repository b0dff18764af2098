"""Compare the answers to single requests with recorded ones of 0.5.23: types, ranges, headers and shapes."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import FAST, PROMPTS, text_of

OPENAI = ["/v1/completions", "/v1/chat/completions", "/v1/responses"]


@pytest.fixture(scope="module")
def newest() -> Iterator[EngineProcess]:
    """Run a unified engine of the newest release with two ranks."""
    with EngineProcess("unified", 2, *FAST) as engine:
        yield engine


@pytest.fixture(scope="module")
def small() -> Iterator[EngineProcess]:
    """Run an engine with a context of 100 tokens, an API key and header overrides."""
    with EngineProcess(
        "unified", 2, *FAST, "--context-length", "100", "--header-overrides", "--api-key", "k"
    ) as engine:
        yield engine


def post(engine: EngineProcess, path: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return httpx.post(engine.url + path, json={**PROMPTS[path], **body}, headers=headers, timeout=20)


def rank_of_last(engine: EngineProcess) -> object:
    return engine.requests()[-1]["rank"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("1", {"error": 'invalid type: string "1", expected i64'}, id="string"),
        pytest.param(True, {"error": "invalid type: boolean `true`, expected i64"}, id="boolean"),
        pytest.param(1.0, {"error": "invalid type: floating point `1.0`, expected i64"}, id="float"),
        pytest.param(2, {"error": {"message": "routed_dp_rank=2 out of range [0, 2)"}}, id="too large"),
        pytest.param(-1, {"error": {"message": "routed_dp_rank=-1 out of range [0, 2)"}}, id="negative"),
    ],
)
def test_generate_refuses_values_that_look_like_ranks(
    newest: EngineProcess, value: object, expected: dict[str, Any]
) -> None:
    """The error has SGLang's text."""
    answer = post(newest, "/generate", routed_dp_rank=value)

    assert answer.status_code == 400
    assert answer.json() == expected
    assert newest.requests()[-1]["outcome"] == "failed"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        pytest.param("x", "int_parsing", id="word"),
        pytest.param(1.5, "int_from_float", id="fraction"),
        pytest.param([1], "int_type", id="list"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", *OPENAI])
def test_wrong_types_are_validation_errors(newest: EngineProcess, path: str, value: object, kind: str) -> None:
    """No path takes these for a rank."""
    answer = post(newest, path, routed_dp_rank=value)

    assert answer.status_code == 400
    assert answer.json()["type"] == "Bad Request"
    assert answer.json()["message"].startswith(
        f"1 validation error:\n  {{'type': '{kind}', 'loc': ('body', 'routed_dp_rank'), 'msg': 'Input should be a valid"
    )


@pytest.mark.parametrize("value", ["1", True, 1.0], ids=repr)
@pytest.mark.parametrize("path", OPENAI)
def test_openai_paths_coerce_values_to_ranks(newest: EngineProcess, path: str, value: object) -> None:
    """Any value that can be read as 1 is rank 1."""
    assert post(newest, path, routed_dp_rank=value).status_code == 200
    assert rank_of_last(newest) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streaming"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_rank_out_of_range_on_openai_paths(newest: EngineProcess, path: str, stream: bool) -> None:
    """It is a 400 also for a stream."""
    answer = post(newest, path, routed_dp_rank=5, stream=stream)

    assert answer.status_code == 400
    message = "routed_dp_rank=5 out of range [0, 2)"
    assert answer.json() == {
        "object": "error", "message": message, "type": "BadRequestError", "param": None, "code": 400
    }  # fmt: skip


def test_rank_out_of_range_in_a_generate_stream(newest: EngineProcess) -> None:
    """There the headers are out already: 200, one error event, the end."""
    answer = post(newest, "/generate", routed_dp_rank=9, stream=True)

    assert answer.status_code == 200
    assert answer.text == (
        'data: {"error":{"message":"routed_dp_rank=9 out of range [0, 2)","type":"invalid_request_error","code":400,'
        '"retryable":false}}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize(
    ("room", "message"),
    [
        pytest.param(
            "12345",
            'invalid type: string "12345", expected a value or an array of values for OptionalInt64OrList',
            id="string",
        ),
        pytest.param(1 << 64, "list_type", id="2^64"),
        pytest.param((1 << 63), "i64", id="2^63"),
    ],
)
def test_generate_refuses_rooms_beyond_64_bits(newest: EngineProcess, room: object, message: str) -> None:
    """The largest room is 2^63-1."""
    answer = post(newest, "/generate", bootstrap_room=room)

    assert answer.status_code == 400
    assert message in answer.text.replace('\\"', '"')
    assert post(newest, "/generate", bootstrap_room=(1 << 63) - 1).status_code == 200


def test_generate_coerced_values_before_0_5_22() -> None:
    """Until 0.5.21 "1" was rank 1 on /generate as well; from 0.5.15 to 0.5.17 data_parallel_rank was not read."""
    with EngineProcess("unified", 2, *FAST, "--sglang-version", "0.5.16") as engine:
        assert post(engine, "/generate", routed_dp_rank="1").json()["meta_info"]["dp_rank"] == 1
        ranks = {post(engine, "/generate", data_parallel_rank=1).json()["meta_info"]["dp_rank"] for _ in range(4)}

        assert ranks == {0, 1}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_deprecated_alias_is_read(newest: EngineProcess, path: str) -> None:
    """data_parallel_rank is routed_dp_rank's old name, and loses against it."""
    assert post(newest, path, data_parallel_rank=1).status_code == 200
    assert rank_of_last(newest) == 1
    assert post(newest, path, data_parallel_rank=1, routed_dp_rank=0).status_code == 200
    assert rank_of_last(newest) == 0


@pytest.mark.parametrize("path", [*OPENAI, "/v1/messages"])
def test_rank_header_beats_the_body(newest: EngineProcess, path: str) -> None:
    """X-Data-Parallel-Rank counts on all paths but /generate."""
    for rank in (0, 1):
        body = {"routed_dp_rank": 1 - rank}
        assert post(newest, path, {"X-Data-Parallel-Rank": str(rank)}, **body).status_code == 200
        assert rank_of_last(newest) == rank


def test_generate_ignores_the_rank_header(newest: EngineProcess) -> None:
    """Not even an impossible rank matters there."""
    assert (
        post(newest, "/generate", {"X-Data-Parallel-Rank": "9"}, routed_dp_rank=1).json()["meta_info"]["dp_rank"] == 1
    )


def test_rank_header_without_a_number_is_a_400(newest: EngineProcess) -> None:
    """It has a text of its own."""
    answer = post(newest, "/v1/chat/completions", {"X-Data-Parallel-Rank": "abc"})

    message = "Invalid X-Data-Parallel-Rank header: must be an integer, got 'abc'"
    assert answer.json() == {"object": "error", "message": message, "type": "400", "param": None, "code": 400}


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_override_headers_are_off_by_default(newest: EngineProcess, path: str) -> None:
    """Even garbage in x-override-* gets a 200."""
    headers = {"X-Override-Routed-Dp-Rank": "abc"}

    assert post(newest, path, headers, routed_dp_rank=1).status_code == 200
    assert rank_of_last(newest) == 1


@pytest.mark.parametrize(
    ("path", "rank"),
    [("/generate", 1), ("/v1/chat/completions", 1), ("/v1/messages", 1), ("/v1/completions", 0)],
)
def test_override_headers_switched_on(small: EngineProcess, path: str, rank: int) -> None:
    """They beat body and X-Data-Parallel-Rank, on three paths."""
    headers = {"Authorization": "Bearer k", "X-Override-Routed-Dp-Rank": "1", "X-Data-Parallel-Rank": "0"}

    assert post(small, path, headers, routed_dp_rank=0).status_code == 200
    assert rank_of_last(small) == rank
    if rank:
        answer = post(small, path, {**headers, "X-Override-Routed-Dp-Rank": "x"})
        assert answer.status_code == 400
        assert text_of(answer).startswith("invalid x-override-routed-dp-rank header 'x': ")


@pytest.mark.parametrize("path", PROMPTS)
def test_invalid_request_is_a_400(newest: EngineProcess, path: str) -> None:
    """Broken JSON, other JSON, no prompt and another content type are refused."""
    json = {"content-type": "application/json"}
    for content in (b'{"model": ', b"[1]", b"", b"{}", b'"x"'):
        assert httpx.post(newest.url + path, content=content, headers=json).status_code == 400
    for headers in ({"content-type": "text/plain"}, {}):
        request = httpx.Request("POST", newest.url + path, json=PROMPTS[path])
        del request.headers["content-type"]
        request.headers.update(headers)
        with loopback.client() as client:
            answer = client.send(request)
        assert answer.status_code == (200 if path == "/generate" and not headers else 400)


def test_errors_have_the_recorded_texts(newest: EngineProcess) -> None:
    """Some errors of 0.5.23 are compared word for word."""
    answer = httpx.post(f"{newest.url}/generate", json={})
    assert answer.json() == {"error": {"message": "Either text, input_ids or input_embeds should be provided."}}
    answer = httpx.post(f"{newest.url}/v1/chat/completions", json={"model": "tiny"})
    assert "{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required'" in answer.json()["message"]
    assert httpx.get(f"{newest.url}/get_load").json() == {"detail": "Not Found"}


def test_prompt_beyond_the_context_is_refused(small: EngineProcess) -> None:
    """The context length counts prompt and answer."""
    key = {"Authorization": "Bearer k"}
    answer = post(small, "/generate", key, text="x" * 480)
    message = "The input (120 tokens) is longer than the model's context length (100 tokens)."
    assert answer.json() == {"error": {"message": message}}
    answer = post(small, "/v1/completions", key, max_tokens=99)
    assert text_of(answer).startswith("Requested token count exceeds the model's maximum context length of 100 tokens.")


def test_duplicate_request_id_is_refused(newest: EngineProcess) -> None:
    """An id may be used again only when its request has ended; a batch numbers its id."""
    answer = post(newest, "/v1/completions", prompt=["a", "b"], rid=["x", "x"])
    assert text_of(answer) == "Duplicate request ID detected: x"
    assert post(newest, "/v1/completions", prompt=["a", "b"], rid="x").status_code == 200
    assert [leg["rid"] for leg in newest.requests()[-1]["legs"]] == ["x_0", "x_1"]
    assert post(newest, "/generate", rid="x").json()["meta_info"]["id"] == "x"


def test_all_pages_need_the_key_but_a_few(small: EngineProcess) -> None:
    """/health, /ready, /metrics and OPTIONS need none."""
    for path in ("/v1/models", "/v1/loads", "/server_info", "/model_info"):
        assert httpx.get(small.url + path).status_code == 401
        assert httpx.get(small.url + path, headers={"Authorization": "Bearer k"}).status_code == 200
    for path in ("/health", "/health_generate", "/ready", "/metrics"):
        assert httpx.get(small.url + path).status_code == 200
    refused = post(small, "/generate")
    assert refused.status_code == 401
    assert refused.json() == {"error": "Unauthorized"}


def test_tokens_are_counted_by_a_simple_rule(newest: EngineProcess) -> None:
    """Four bytes are a token, token ids are exact, a chat has a small overhead."""
    for body, tokens in (({"text": "12345"}, 2), ({"text": "東京"}, 2), ({"text": None, "input_ids": [7] * 9}, 9)):
        assert post(newest, "/generate", **body).json()["meta_info"]["prompt_tokens"] == tokens
    parts = [{"role": "user", "content": [{"type": "text", "text": "12345678"}]}]
    assert post(newest, "/v1/chat/completions", messages=parts).json()["usage"] == {
        "prompt_tokens": 3 + 4 + 2,
        "total_tokens": 3 + 4 + 2 + 3,
        "completion_tokens": 3,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }


def test_chat_uses_token_ids_as_its_prompt(newest: EngineProcess) -> None:
    """They take the place of its messages, which must be there all the same."""
    answer = post(newest, "/v1/chat/completions", input_ids=[5, 6])

    assert answer.json()["usage"]["prompt_tokens"] == 2


def test_several_samples_on_a_unified_server(newest: EngineProcess) -> None:
    """Choices are numbered, and the prompt counts once."""
    answer = post(newest, "/v1/completions", n=2).json()

    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2, 6)


def test_stream_has_one_event_per_token(newest: EngineProcess) -> None:
    """/generate repeats the text so far in each event; completions send the next piece only."""
    events = post(newest, "/generate", stream=True).text.split("\n\n")
    assert len(events) == 3 + 2
    assert '"completion_tokens":3' in events[2]
    assert '"finish_reason":{"type":"length","length":3}' in events[2]
    assert events[3:] == ["data: [DONE]", ""]
    events = post(newest, "/v1/completions", stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert len(events) == 3 + 3
    assert '"choices":[],"usage":{"prompt_tokens":2' in events[3]
