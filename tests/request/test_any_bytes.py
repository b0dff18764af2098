"""Any bytes of a body are a request or a refusal, and never an exception."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_extproc.request.body import InferenceRequest, read_body, refuse_disaggregated
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Rejection
from dp_extproc.request.rewrite import Bootstrap, LegFields, rewrite_aggregated, rewrite_disaggregated

FIELDS = LegFields(routed_rank=1, prefill_rank=1, request_id="a")

SEEDS = [
    b'{"model":"m","stream":true,"messages":[{"role":"user","content":"caf\xc3\xa9"}],"n":1,"rid":"x"}',
    b'{"messages":[{"content":[{"type":"image_url","image_url":{"url":"data:"}},{"type":"text","text":"\\u00e9"}]}]}',
    b'{"messages":[{"content":[{"type":"tool_result","content":[{"type":"image"}]}]}],"system":[{"text":"a"}]}',
    b'{"input":[{"type":"function_call_output","output":[{"type":"input_text","text":"a"}]}],"tools":[{}]}',
    b'{"prompt":[[1,2],[3]],"max_tokens":1e2,"routed_dp_rank":0,"stream_options":{"include_usage":true}}',
    b'{"text":["a","b"],"sampling_params":[{"n":1},{"max_new_tokens":5}],"bootstrap_room":[1,2]}',
    b'{"input_embeds":[[[0.1,-2e-3],[1,2]]],"text":null}',
]
TOKENS = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e999", b"-", b"\\ud800", b"\xff", b"\0", b" "]


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """Draw a valid body with a few of its bytes removed or replaced."""
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + draw(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=3))) + text[end:]
    return text


def judge(api: Api, text: bytes) -> None:
    """Read and rewrite a body; what is accepted must be JSON for Python, too, and stay JSON in both legs."""
    request = read_body(api, text)
    if isinstance(request, Rejection):
        assert 400 <= request.status < 500
        assert json.loads(request.body())["error"]["message"]
        return
    assert isinstance(request, InferenceRequest)
    json.loads(text)
    refuse_disaggregated(request)
    batch = request.prompt.batch
    bootstrap = Bootstrap("h", 1, 5 if batch is None else [5] * batch)
    legs = rewrite_disaggregated(request.body, batch, bootstrap, FIELDS, FIELDS)
    for leg in (legs.prefill, legs.decode):
        assert json.loads(leg)["routed_dp_rank"] == 1
    assert json.loads(rewrite_aggregated(request.body, "routed_dp_rank", 2))["routed_dp_rank"] == 2


@given(st.sampled_from(Api), st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(api: Api, text: bytes) -> None:
    """Noise is refused, and nothing is raised."""
    judge(api, text)


@settings(max_examples=500)
@given(st.sampled_from(Api), _mutated())
def test_damaged_body_is_read_or_refused(api: Api, text: bytes) -> None:
    """A body that was nearly right is refused, or right for every JSON reader."""
    judge(api, text)


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)
_known_keys = st.sampled_from([
    "model", "stream", "n", "max_tokens", "text", "input_ids", "input_embeds", "sampling_params", "prompt", "messages",
    "tools", "system", "input", "instructions", "content", "type", "output", "routed_dp_rank", "rid", "background",
])  # fmt: skip


@settings(max_examples=500)
@given(
    st.sampled_from(Api),
    st.dictionaries(
        _known_keys,
        _json_values | st.lists(st.dictionaries(_known_keys, _json_values, max_size=3), max_size=3),
        max_size=5,
    ),
)
def test_known_keys_may_have_any_value(api: Api, body: dict[str, object]) -> None:
    """No value of any type under any key that is read raises an error."""
    judge(api, json.dumps(body).encode())


@pytest.mark.parametrize("api", Api)
@pytest.mark.parametrize("depth", [10, 300, 900, 1_000, 1_100, 100_000])
def test_any_depth_of_nesting_is_read_or_refused(api: Api, depth: int) -> None:
    """Nested tool results, messages and lists are read or refused at any depth."""
    opening, closing = b'[{"type":"tool_result","content":', b"}]"
    for value in (opening * depth + b"1" + closing * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth):
        for key in (b"messages", b"input", b"prompt", b"text", b"tools", b"x"):
            text = b'{"messages":[],"input":"","prompt":"","text":"","%s":%s}' % (key, value)
            request = read_body(api, text)
            assert isinstance(request, InferenceRequest | Rejection)
