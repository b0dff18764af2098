"""Refusals of engines that are no fault of the client: the rank of a request is not one of the engine's. Pure.

SGLang (``managers/tokenizer_manager.py``, from 0.5.10 on) and vLLM refuse a rank that they do not have. That happens
when another engine has come to stand behind an address. An inactive rank of SGLang's elastic expert parallelism is
refused in ``managers/data_parallel_controller.py``; up to 0.5.23 the engine ends there, instead of answering.
"""

import re
from enum import Enum, auto
from typing import Any, Final

import msgspec

_MOST_BYTES: Final = 4096
"""Bytes of an answer that may be such a refusal, which has some hundred."""
_OUT_OF_RANGE: Final = re.compile(
    r"(?:routed_dp_rank=-?\d{1,9}|data_parallel_rank -?\d{1,9} is) out of range \[0, \d{1,9}\)\.?"
)
_INACTIVE: Final = re.compile(r"DP rank -?\d{1,9} is not active\.?")


class WrongRank(Enum):
    """Why an engine has refused a rank."""

    OUT_OF_RANGE = auto()
    """It has fewer ranks."""
    INACTIVE = auto()
    """It has the rank, but does not use it at present."""


def wrong_rank(text: bytes) -> WrongRank | None:
    """Return why an engine has refused the rank of a request; None if this is another error.

    The whole message has to be the refusal: within a longer one it may be quoted from the request.
    """
    if len(text) > _MOST_BYTES:
        return None
    try:
        message = _message(msgspec.json.decode(text))
    except (ValueError, RecursionError):  # errors of msgspec are ValueErrors
        return None
    if _OUT_OF_RANGE.fullmatch(message):
        return WrongRank.OUT_OF_RANGE
    return WrongRank.INACTIVE if _INACTIVE.fullmatch(message) else None


def _message(error: Any) -> str:
    inner = error.get("error", error) if isinstance(error, dict) else error
    message = inner.get("message") if isinstance(inner, dict) else inner
    return message if isinstance(message, str) else ""
