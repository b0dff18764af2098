"""Token ids that no vocabulary has are refused in every field: they would end the process of an engine."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.request.body import InferenceRequest, read_body
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection

LARGEST = 2**31 - 1
CHAT = '{"messages":[{"role":"user","content":"hi"}],'
IN_SAMPLING = '{"text":"a","sampling_params":'


@pytest.mark.parametrize(
    ("api", "body", "param", "place"),
    [
        pytest.param(Api.COMPLETIONS, '{"prompt":[-1,5]}', "prompt", "prompt[0]", id="completions"),
        pytest.param(Api.COMPLETIONS, '{"prompt":[[1,2],[3,-4]]}', "prompt", "prompt[1][1]", id="completions, batch"),
        pytest.param(Api.COMPLETIONS, '{"prompt":[2147483648]}', "prompt", "prompt[0]", id="completions, 2^31"),
        pytest.param(Api.COMPLETIONS, f'{{"prompt":[{2**63}]}}', "prompt", "prompt[0]", id="completions, 2^63"),
        pytest.param(Api.COMPLETIONS, f'{{"prompt":[-{10**30}]}}', "prompt", "prompt[0]", id="completions, -10^30"),
        pytest.param(Api.GENERATE, '{"input_ids":[1,-1]}', "input_ids", "input_ids[1]", id="generate"),
        pytest.param(Api.GENERATE, '{"input_ids":[[1],[-1]]}', "input_ids", "input_ids[1][0]", id="generate, batch"),
        pytest.param(
            Api.GENERATE, '{"text":"a","input_ids":[-1]}', "input_ids", "input_ids[0]", id="generate, beside a text"
        ),
        pytest.param(Api.CHAT, f'{CHAT}"input_ids":[7,-1]}}', "input_ids", "input_ids[1]", id="chat"),
        pytest.param(
            Api.CHAT,
            '{"messages":[{"content":{"new":1}}],"input_ids":[-1]}',
            "input_ids",
            "input_ids[0]",
            id="chat of an unknown form",
        ),
        pytest.param(
            Api.COMPLETIONS, '{"prompt":"a","stop_token_ids":[-1]}', "stop_token_ids", "stop_token_ids", id="stop"
        ),
        pytest.param(
            Api.COMPLETIONS,
            '{"prompt":"a","stop_token_ids":["-1"]}',
            "stop_token_ids",
            "stop_token_ids",
            id="stop, as a text",
        ),
        *(
            pytest.param(
                api, f'{body}"stop_token_ids":["{hidden}"]}}', "stop_token_ids", "stop_token_ids", id=f"{name}, {api}"
            )
            for name, hidden in {
                "stop, escaped": r"\u002d5",
                "stop, with underscores": "9_999_999_999",
                "stop, with an exponent": "1e5",
            }.items()
            for api, body in ((Api.COMPLETIONS, '{"prompt":"a",'), (Api.CHAT, CHAT))
        ),
        pytest.param(Api.CHAT, f'{CHAT}"stop_token_ids":[1e30]}}', "stop_token_ids", "stop_token_ids", id="stop, huge"),
        pytest.param(
            Api.CHAT, f'{CHAT}"stop_token_ids":[-1e400]}}', "stop_token_ids", "stop_token_ids", id="stop, no number"
        ),
        pytest.param(
            Api.GENERATE,
            f'{IN_SAMPLING}{{"stop_token_ids":[5,-1]}}}}',
            "stop_token_ids",
            "stop_token_ids",
            id="stop of generate",
        ),
        pytest.param(
            Api.GENERATE,
            f'{IN_SAMPLING}[{{}},{{"stop_token_ids":[-1]}}]}}',
            "stop_token_ids",
            "stop_token_ids",
            id="stop of one prompt",
        ),
        pytest.param(
            Api.GENERATE,
            '{"text":"a","token_ids_logprob":[[1],[-1]]}',
            "token_ids_logprob",
            "token_ids_logprob",
            id="log probabilities",
        ),
    ],
)
def test_invalid_id_is_refused(api: Api, body: str, param: str, place: str) -> None:
    """The refusal names the field and, in a prompt, the very place."""
    refusal = read_body(api, body.encode())

    assert isinstance(refusal, Rejection), refusal
    assert (refusal.status, refusal.reason, refusal.param) == (400, Reason.UNSUPPORTED_VALUE, param)
    assert refusal.message.startswith(f"{place} is not valid")


@pytest.mark.parametrize(
    ("api", "body", "tokens"),
    [
        pytest.param(Api.COMPLETIONS, f'{{"prompt":[0,{LARGEST}]}}', 2, id="the least and the largest"),
        pytest.param(Api.COMPLETIONS, '{"prompt":[-0]}', 1, id="minus nothing"),
        pytest.param(Api.COMPLETIONS, '{"prompt":["-1","-2"]}', 0, id="texts that look like ids"),
        pytest.param(Api.GENERATE, '{"text":"-1","input_ids":null}', 0, id="null"),
        pytest.param(
            Api.GENERATE,
            f'{IN_SAMPLING}{{"stop_token_ids":[2,1.0," 5 ",null,{LARGEST}]}}}}',
            0,
            id="stop, in every form",
        ),
        pytest.param(Api.GENERATE, f'{IN_SAMPLING}{{"stop_token_ids":null}}}}', 0, id="no stop"),
        pytest.param(Api.GENERATE, '{"text":"a","token_ids_logprob":[[1],[2]]}', 0, id="log probabilities"),
        pytest.param(Api.COMPLETIONS, '{"prompt":"a","logit_bias":{"-1":1},"seed":-1}', 0, id="no ids, or checked"),
        pytest.param(Api.RESPONSES, '{"input":"a","stop_token_ids":[-1]}', 0, id="a field that this path has not"),
    ],
)
def test_other_numbers_pass(api: Api, body: str, tokens: int) -> None:
    """What some release takes, or refuses by itself, is not refused here."""
    request = read_body(api, body.encode())

    assert isinstance(request, InferenceRequest), request
    assert request.prompt.tokens == tokens


@given(st.lists(st.integers(-(2**70), 2**70) | st.integers(-3, 3) | st.integers(LARGEST - 2, LARGEST + 2), min_size=1))
def test_ids_pass_exactly_if_all_are_valid(ids: list[int]) -> None:
    """The position of the invalid one in a list does not matter, nor the form of the list."""
    possible = all(0 <= each <= LARGEST for each in ids)
    listed = b"[%s]" % b",".join(b"%d" % each for each in ids)
    for api, body in (
        (Api.COMPLETIONS, b'{"prompt":%s}' % listed),
        (Api.COMPLETIONS, b'{"prompt":[[1],%s]}' % listed),
        (Api.GENERATE, b'{"input_ids":%s}' % listed),
        (Api.CHAT, b'{"messages":[],"input_ids":%s}' % listed),
        (Api.GENERATE, b'{"text":"a","sampling_params":{"stop_token_ids":%s}}' % listed),
    ):
        assert isinstance(read_body(api, body), InferenceRequest) == possible, body


def test_ids_of_a_chat_are_its_prompt() -> None:
    """SGLang does not apply the chat template then, so the messages are not counted."""
    body = {"messages": [{"role": "user", "content": "x" * 1000}], "input_ids": [1, 2, 3]}
    request = read_body(Api.CHAT, msgspec.json.encode(body))

    assert isinstance(request, InferenceRequest)
    assert (request.prompt.text_bytes, request.prompt.tokens, request.prompt.batch) == (0, 3, None)
