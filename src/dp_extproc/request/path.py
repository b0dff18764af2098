"""Reads what a method and a path ask for. A path that is not listed here never reaches an engine.

A prefill engine with several DP ranks ends its whole process at a request without a bootstrap room (assertion in
SGLang's ``data_parallel_controller.py``). A path whose handler builds a request object of its own drops the bootstrap
room, so such paths are refused.
"""

from enum import Enum, StrEnum
from typing import Final

from dp_extproc.request.rejection import Reason, Rejection


class Api(StrEnum):
    """The request formats that have routing fields."""

    GENERATE = "/generate"
    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


class Lookup(Enum):
    """Requests without a body."""

    ENGINE = "any engine can answer"
    MODELS = "the service answers itself"


INFERENCE: Final = {api.value: api for api in Api}

LOOKUPS: Final = {
    **dict.fromkeys(("/health", "/health_generate", "/ready"), Lookup.ENGINE),
    **dict.fromkeys(("/model_info", "/get_model_info", "/server_info", "/get_server_info"), Lookup.ENGINE),
    "/v1/models": Lookup.MODELS,
}

ONE_MODEL: Final = "/v1/models/"
"""The start of a path that asks for one model."""

_WITHOUT_FIELDS: Final = frozenset({
    "/v1/embeddings", "/encode", "/v1/classify", "/classify", "/v1/rerank", "/v1/score",
    "/v1/audio/transcriptions", "/v1/realtime", "/api/chat", "/api/generate", "/vertex_generate", "/invocations",
})  # fmt: skip
"""SGLang paths whose handlers drop the routing fields, or nest them where a rewrite of the body cannot reach."""


def read_path(method: str, path: str) -> Api | Lookup | Rejection:
    """Read what a request asks for.

    Args:
        method: The method as it was received, in upper case.
        path: The ``:path`` pseudo header with its query. It is compared without decoding, so that an escaped or
            doubled slash, which an engine may decode, is an unknown path.
    """
    plain = path.partition("?")[0]
    if (api := INFERENCE.get(plain)) is not None:
        return api if method == "POST" else _wrong_method(method, plain, "POST")
    lookup = LOOKUPS.get(plain) or (Lookup.MODELS if plain.startswith(ONE_MODEL) else None)
    if lookup is not None:
        return lookup if method == "GET" else _wrong_method(method, plain, "GET")
    if plain in _WITHOUT_FIELDS:
        message = f"{plain} cannot carry the fields that route a request to a data-parallel rank; {_supported()}"
        return Rejection(400, Reason.CANNOT_CARRY_ROUTING, message)
    return Rejection(404, Reason.UNKNOWN_PATH, f"unknown path {plain[:200]!r}; {_supported()}")


def _wrong_method(method: str, path: str, allowed: str) -> Rejection:
    message = f"{path} takes {allowed}, not {method}"
    return Rejection(405, Reason.WRONG_METHOD, message, headers=(("allow", allowed),))


def _supported() -> str:
    return f"supported: POST {', '.join(INFERENCE)}; GET {', '.join(LOOKUPS)}"
