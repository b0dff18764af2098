"""What of the response to a request only the prefill leg's response has, or neither leg's.

The members of all responses are listed in ``docs/engines/answers.md``.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

import msgspec
from msgspec import Raw, Struct

from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import Api
from dp_extproc.request.token_ids import LOGPROBS_OF_IDS

Values = Mapping[str, Raw]
"""Members of a request body."""

_LOGPROBS: Final = "return_logprob"
_LOGPROBS_START: Final = "logprob_start_len"
_NO_PROMPT: Final = frozenset({b"null", b"-1"})
"""Values of :data:`_LOGPROBS_START` that leave out the prompt."""
_ECHO: Final = "echo"
_ECHO_LOGPROBS: Final = "logprobs"
_FALSE: Final = frozenset({"", "0", "0.0", "off", "f", "false", "n", "no"})
"""Texts that pydantic reads as false, or as the number 0."""

_LOST: Final = {
    "return_hidden_states": (Api.GENERATE, Api.COMPLETIONS, Api.CHAT),
    "return_routed_experts": (Api.GENERATE, Api.COMPLETIONS, Api.CHAT),
    "return_indexer_topk": (Api.GENERATE,),
}
"""Members of bodies that ask for rows of the prompt, which no response of a disaggregated pair has reliably.

Prefill engines collect no hidden states and no top-k rows of the indexer (prefill.py), and routed experts only from
0.5.22 on; decode engines have none of the prompt.
"""


class PromptPart(Enum):
    """What the prefill leg's response has for the client's."""

    LOGPROBS = auto()
    """Log probabilities on /generate."""
    ECHO = auto()
    """Log probabilities of an echoed prompt on /v1/completions."""


class Wanted(Struct, frozen=True):
    """What a request wants of the prefill leg's response."""

    part: PromptPart
    param: str
    """The member of the body that asks for it."""
    is_needed: bool = True
    """Whether the client's response is incomplete without it."""


def wanted_of_prefill(api: Api, values: Values) -> Wanted | None:
    """Read what a request wants of the prefill leg's response; None for nothing."""
    if api is Api.COMPLETIONS and is_on(values.get(_ECHO)) and is_on(values.get(_ECHO_LOGPROBS)):
        return Wanted(PromptPart.ECHO, _ECHO_LOGPROBS)
    if api is Api.GENERATE and is_on(values.get(_LOGPROBS)):
        start, ids = (bytes(values.get(key, b"null")) for key in (_LOGPROBS_START, LOGPROBS_OF_IDS))
        return Wanted(PromptPart.LOGPROBS, _LOGPROBS, is_needed=start not in _NO_PROMPT or ids != b"null")
    return None


def refuse_parts(api: Api, values: Values, *, sees_answer: bool) -> Rejection | None:
    """Refuse a request whose response would be incomplete.

    *sees_answer* is whether the body of the response passes through the service, and can be changed.
    """
    for param, apis in _LOST.items():
        if api in apis and is_on(values.get(param)):
            message = (
                f"{param} does not work with prefill/decode disaggregation, because no engine has its rows of the "
                "prompt; leave it out or send false"
            )
            return Rejection(400, Reason.UNSUPPORTED_VALUE, message, param)
    wanted = wanted_of_prefill(api, values)
    if wanted is None or not wanted.is_needed or sees_answer:
        return None
    remedy = "leave out echo" if wanted.part is PromptPart.ECHO else "leave out logprob_start_len and token_ids_logprob"
    message = (
        "log probabilities of the prompt cannot be put into the answer while Envoy sends bodies in duplex mode; "
        f"{remedy}, or have Envoy configured with body_mode: buffered"
    )
    return Rejection(400, Reason.UNSUPPORTED_VALUE, message, wanted.param)


def is_on(value: Raw | None) -> bool:
    """Return whether a value is neither absent nor one that engines read as false or zero.

    A list is on if one of its values is. Engines refuse what is neither.
    """
    if value is None:
        return False
    try:
        found = msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return True
    return any(map(_is_on, found)) if isinstance(found, list) else _is_on(found)


def _is_on(value: object) -> bool:
    return value.lower() not in _FALSE if isinstance(value, str) else bool(value)
