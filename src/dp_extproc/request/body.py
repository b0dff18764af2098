"""What a request body asks for, read once; or why it is refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from dp_extproc.request.members import JsonObject
from dp_extproc.request.path import Api
from dp_extproc.request.prompt import Prompt, PromptError, read_prompt
from dp_extproc.request.rejection import Reason, Rejection

MAX_BATCH: Final = 4096
"""Prompts in one request. The prefill leg's prefix travels in a header of Envoy and holds a request id per prompt."""

ROUTED_RANK: Final = "routed_dp_rank"
PREFILL_RANK: Final = "disagg_prefill_dp_rank"
OLD_RANK: Final = "data_parallel_rank"


@dataclass(slots=True)
class InferenceRequest:
    """What matters for placing and rewriting a request. Not frozen: one is made per request, on the hot path."""

    api: Api
    body: JsonObject
    model: str | None
    stream: bool
    prompt: Prompt
    max_tokens: int | None
    """As the client sent it, per prompt; None leaves it to the engine."""
    samples: int
    """``n``: answers per prompt; the largest one in a batch."""
    routed_rank_pin: int | None
    """Decode (or worker) rank that the client asked for."""
    prefill_rank_pin: int | None


class _WrongTypeError(ValueError):
    def __init__(self, param: str, wanted: str) -> None:
        super().__init__(f"{param} must be {wanted}")
        self.param = param


class _Sampling(msgspec.Struct):
    n: int | None = None
    max_new_tokens: int | None = None


_string: Final = msgspec.json.Decoder(str | None)
_boolean: Final = msgspec.json.Decoder(bool | None)
_integer: Final[msgspec.json.Decoder[int | None]] = msgspec.json.Decoder(int | None)
_sampling: Final = msgspec.json.Decoder(_Sampling | list[_Sampling] | None)

_MAX_TOKENS_KEYS: Final = {
    Api.COMPLETIONS: ("max_tokens",),
    Api.CHAT: ("max_completion_tokens", "max_tokens"),
    Api.RESPONSES: ("max_output_tokens",),
    Api.MESSAGES: ("max_tokens",),
}


def read_body(api: Api, text: bytes) -> InferenceRequest | Rejection:
    """Read a request body.

    Args:
        api: What the path asked for; tells where the prompt and its limits stand.
        text: The whole body.
    """
    if not text or text.isspace():
        return Rejection(400, Reason.EMPTY_BODY, "the request body is empty; send a JSON object")
    try:
        body = JsonObject(text)
    except msgspec.ValidationError:
        return Rejection(400, Reason.NOT_AN_OBJECT, "the request body must be a JSON object")
    except msgspec.DecodeError as error:
        return Rejection(400, Reason.INVALID_JSON, f"the request body is not valid JSON: {error}")
    except UnicodeDecodeError as error:
        return Rejection(400, Reason.INVALID_JSON, f"the request body is not valid UTF-8 (byte {error.start})")
    except RecursionError:
        return Rejection(400, Reason.INVALID_JSON, "the request body is nested too deeply")
    values = body.values
    try:
        samples, max_tokens = _read_limits(api, values)
        prompt = read_prompt(api, values)
        model = _read(values, "model", _string, "a string")
        stream = _read(values, "stream", _boolean, "true or false")
    except _WrongTypeError as error:
        return Rejection(400, Reason.WRONG_TYPE, str(error), param=error.param)
    except PromptError as error:
        reason = Reason.MISSING_FIELD if error.missing else Reason.WRONG_TYPE
        return Rejection(400, reason, str(error), param=error.param)
    except RecursionError:
        return Rejection(400, Reason.INVALID_JSON, "the request body is nested too deeply")
    if prompt.batch is not None and prompt.batch > MAX_BATCH:
        message = f"a batch of {prompt.batch} prompts is too large; send at most {MAX_BATCH} in one request"
        return Rejection(400, Reason.UNSUPPORTED_VALUE, message)
    return InferenceRequest(
        api=api,
        body=body,
        model=model,
        stream=bool(stream),
        prompt=prompt,
        max_tokens=max_tokens,
        samples=samples,
        routed_rank_pin=_pin(values, ROUTED_RANK) if ROUTED_RANK in values else _pin(values, OLD_RANK),
        prefill_rank_pin=_pin(values, PREFILL_RANK),
    )


def refuse_disaggregated(request: InferenceRequest) -> Rejection | None:
    """Refuse what SGLang cannot do when prefill and decode are different servers, with the way around it."""
    if request.samples > 1:
        # Every version clones one bootstrap room for all samples (tokenizer_manager.py): hangs or wrong answers.
        message = (
            f"n={request.samples} does not work with prefill/decode disaggregation; send {request.samples} requests"
        )
        return Rejection(400, Reason.UNSUPPORTED_VALUE, message, param="n")
    if request.api is Api.RESPONSES:
        values = request.body.values
        for param, remedy in (
            ("previous_response_id", "send the conversation in input"),  # the store of one server knows the answer
            ("background", "leave it out or send false"),  # prefill would answer before it has run
        ):
            if param in values and bytes(values[param]) not in {b"null", b"false"}:
                message = f"{param} does not work with prefill/decode disaggregation; {remedy}"
                return Rejection(400, Reason.UNSUPPORTED_VALUE, message, param=param)
    return None


def _read(values: dict[str, msgspec.Raw], param: str, decoder: msgspec.json.Decoder[Any], wanted: str) -> Any:
    raw = values.get(param)
    if raw is None:
        return None
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError:
        raise _WrongTypeError(param, wanted) from None


def _read_limits(api: Api, values: dict[str, msgspec.Raw]) -> tuple[int, int | None]:
    """Read the number of samples and the limit of output tokens."""
    if api is Api.GENERATE:
        wanted = "an object (or a list of them) with integers n and max_new_tokens"
        sampling = list(_flat(_read(values, "sampling_params", _sampling, wanted)))
        limits = [one.max_new_tokens for one in sampling if one.max_new_tokens is not None]
        return max((one.n or 1 for one in sampling), default=1), max(limits, default=None)
    samples = _read(values, "n", _integer, "an integer") or 1
    for param in _MAX_TOKENS_KEYS[api]:
        if (limit := _read(values, param, _integer, "an integer")) is not None:
            return samples, limit
    return samples, None


def _flat(sampling: _Sampling | list[_Sampling] | None) -> Iterator[_Sampling]:
    if isinstance(sampling, list):
        yield from sampling
    elif sampling is not None:
        yield sampling


def _pin(values: dict[str, msgspec.Raw], param: str) -> int | None:
    """A rank that is no integer is no pin; it is replaced like one that is out of range."""
    raw = values.get(param)
    if raw is None:
        return None
    try:
        return _integer.decode(raw)
    except msgspec.DecodeError:
        return None
