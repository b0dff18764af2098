"""Scalars are read in every form in which engines take them: pydantic's lax mode is the reference."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dp_extproc.request.body import InferenceRequest, read_body, refuse_disaggregated
from dp_extproc.request.lenient import as_bool, as_integer
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import Api

TEXTS = st.from_regex(r"\A[ \t]?[+-]?[0-9_]{0,4}(\.[0-9]{0,2})?(e[0-9])?[ \n]?\Z")
WORDS = st.sampled_from(["true", "True", "TRUE", "t", "yes", "Y", "on", "1", "false", "f", "n", "off", "0", "x", ""])
SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-5, 5) | TEXTS | WORDS


@given(value=SCALARS)
def test_scalar_is_read_as_pydantic_reads_it(value: Any) -> None:
    """A value that pydantic refuses is left to the engine, so it does not matter here."""
    for kind, read in ((bool, as_bool), (int, as_integer)):
        try:
            expected = TypeAdapter(kind).validate_python(value)
        except ValidationError:
            continue
        assert read(value) == expected


@pytest.mark.parametrize(
    ("api", "body", "stream", "priority"),
    [
        (Api.CHAT, b'{"messages":[],"stream":"true","priority":"5","max_tokens":"256","n":1.0}', True, 5),
        (Api.COMPLETIONS, b'{"prompt":"a","stream":1,"priority":5.0,"max_tokens":1e3,"n":"1"}', True, 5),
        (Api.RESPONSES, b'{"input":"a","stream":0,"priority":true,"n":7}', False, 1),
        (Api.MESSAGES, b'{"messages":[],"stream":"yes","priority":5,"n":7}', True, 0),
        (Api.GENERATE, b'{"text":"a","stream":"off","priority":"x","n":7,"model":7,"max_tokens":[]}', False, 0),
        (Api.CHAT, b'{"messages":[],"stream":"maybe","n":"x"}', False, 0),
    ],
)
def test_request_is_read_as_its_path_reads_it(api: Api, body: bytes, *, stream: bool, priority: int) -> None:
    """Fields that a path does not have are not read, and values that the engine refuses are left to it."""
    request = read_body(api, body)

    assert isinstance(request, InferenceRequest)
    assert (request.stream, request.priority, request.samples) == (stream, priority, 1)
    assert refuse_disaggregated(request) is None


@pytest.mark.parametrize("n", [b"2", b'"2"', b"2.0", b'"2.0"', b'" 2"', b"2e0", b'"+2"', b'"0_2"'])
def test_several_samples_are_refused_in_every_form(n: bytes) -> None:
    """In disaggregated pools they would hang."""
    request = read_body(Api.CHAT, b'{"messages":[],"n":' + n + b"}")

    assert isinstance(request, InferenceRequest)
    refusal = refuse_disaggregated(request)
    assert refusal is not None
    assert (refusal.status, refusal.param) == (400, "n")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"text":["a"],"sampling_params":[]}', "sampling_params"),
        (b'{"text":"a","sampling_params":[{}]}', "sampling_params"),
        (b'{"text":["a","b"],"sampling_params":[{}]}', "sampling_params"),
        (b'{"text":"a","sampling_params":{"n":null}}', "n"),
        (b'{"text":"a","sampling_params":{"n":"2"}}', "n"),
        (b'{"text":"a","sampling_params":{"n":2.0}}', "n"),
        (b'{"input_embeds":[]}', "input_embeds"),
        (b'{"input_embeds":[[]]}', "input_embeds"),
        (b'{"text":"x","input_ids":[[1,2],[3]]}', "input_ids"),
        (b'{"text":["x"],"input_ids":[1,2]}', "input_ids"),
        (b'{"text":["x","y"],"input_ids":[[1]]}', "input_ids"),
        (b'{"text":"x","return_logprob":[true]}', "return_logprob"),
        (b'{"text":"x","logprob_start_len":[0]}', "logprob_start_len"),
        (b'{"text":["x","y"],"top_logprobs_num":[1]}', "top_logprobs_num"),
        (b'{"text":["x","y"],"token_ids_logprob":[[1]]}', "token_ids_logprob"),
        (b'{"text":["x","y"],"lora_path":["a"]}', "lora_path"),
        (b'{"text":"x","rid":["a"]}', "rid"),
        (b'{"input_ids":[[1],[2]],"video_data":["v"]}', "video_data"),
    ],
)
def test_body_of_generate_is_refused_if_engines_answer_it_with_500(body: bytes, param: str) -> None:
    """The mistake is the client's, and each engine would count as failing (``managers/io_struct.py``)."""
    refusal = read_body(Api.GENERATE, body)

    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason, refusal.param) == (400, Reason.WRONG_TYPE, param)


@pytest.mark.parametrize(
    "body",
    [
        b'{"text":["a","b"],"sampling_params":[{"n":1},{}],"return_logprob":[true,false],"lora_path":[null,"a"]}',
        b'{"text":["a","b"],"input_ids":[[1],[2],[3]],"token_ids_logprob":[1,2]}',
        b'{"text":"a","image_data":["x"],"video_data":["y","z"],"modalities":["image"],"return_hidden_states":true}',
        b'{"text":"a","sampling_params":{"n":1.0},"logprob_start_len":0,"rid":"a"}',
        b'{"input_embeds":[[1,2],[3,4]]}',
        b'{"input_embeds":[[[1,2]],[[3,4]]],"top_logprobs_num":[1,2]}',
    ],
)
def test_body_of_generate_passes_if_engines_serve_it(body: bytes) -> None:
    """Lists may be longer than the batch."""
    assert isinstance(read_body(Api.GENERATE, body), InferenceRequest)
