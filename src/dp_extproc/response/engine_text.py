"""The text of an engine's error, as a client may see it: without what the router has added to the request.

Validation errors of SGLang repeat the whole input, with the routing fields that the rewriting of the body has added.
Errors of a transfer name the address of the other engine.
"""

import re
from typing import Final

import msgspec

_NAMES: Final = (
    rb"(?:bootstrap_(?:host|port|room|pair_key)|disagg_prefill_dp_rank|routed_dp_rank|data_parallel_rank|rid)"
)
_QUOTE: Final = rb"(?P<quote>\\{0,16}['\"])"
_VALUE: Final = rb"(?:\\{0,16}['\"][^'\"\\]*\\{0,16}['\"]|-?\d+|None|null|\[[^\[\]{}]*\])"
_MEMBER: Final = re.compile(
    rb"(?:,\s*)?"
    + _QUOTE
    + _NAMES
    + rb"(?P=quote)\s*:\s*"
    + _VALUE
    + rb"|\b(?:[\w.]{1,60}\.)?"
    + _NAMES
    + rb"\s*=\s*"
    + _VALUE
)
"""A routing field: as a member of an object in JSON or in Python, at any depth of escaping, or as ``name=value``."""
_CUT: Final = re.compile(rb"input_value=\{.{0,200}?\}, input_type=dict")
"""An input of which Python shows the beginning and the end alone, which may cut a routing field."""
_FIRST: Final = re.compile(rb"\{\s*,\s*")
_PRIVATE: Final = re.compile(
    rb"\b(?:10(?:\.\d{1,3}){3}|127(?:\.\d{1,3}){3}|169\.254(?:\.\d{1,3}){2}|192\.168(?:\.\d{1,3}){2}"
    rb"|172\.(?:1[6-9]|2\d|3[01])(?:\.\d{1,3}){2}|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7])(?:\.\d{1,3}){2})(?::\d+)?\b"
    rb"|\[(?:::1|f[cde][0-9a-f]{2}:[0-9a-f:]*)\](?::\d+)?"
)
"""An address of a private network, with its port."""
_ADDRESS: Final = b"(address)"
_ID: Final = re.compile(rb"\bdp[0-9a-f]{24}[\w.-]*")
"""The id of a leg in running text, such as "Request ID exceeds"."""
_NO_ANSWER: Final = b"upstream connect error or disconnect/reset before headers"
"""The beginning of the text with which Envoy answers for an engine that did not."""
_CAUSE: Final = re.compile(rb"reset reason: (?P<cause>[^{}<>]{1,200})")


def scrub(text: bytes) -> bytes:
    """Remove routing fields and private addresses from the text of an engine's error."""
    text = _CUT.sub(b"input_type=dict", text)
    text = _FIRST.sub(b"{", _MEMBER.sub(b"", text))
    return _PRIVATE.sub(_ADDRESS, _ID.sub(b"(id)", text))


def reshape(text: bytes, kind: str) -> bytes:
    """Add ``error``, which official clients of OpenAI read, to an error that has SGLang's or FastAPI's members alone.

    *kind* is the type of an error that has none.
    """
    body, message = _read_flat(text)
    if message is None:
        return text
    error = {"message": message, "type": body.get("type", kind), "param": body.get("param"), "code": body.get("code")}
    return msgspec.json.encode({"error": error, **body})


def flat_message(text: bytes) -> str | None:
    """Return the message of an error that has the members of SGLang or FastAPI alone; None for any other text."""
    return _read_flat(text)[1]


def _read_flat(text: bytes) -> tuple[dict[str, object], str | None]:
    try:
        body = msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}, None
    message = body.get("message", body.get("detail"))
    return body, message if isinstance(message, str) and "error" not in body else None


def no_answer(text: bytes) -> str | None:
    """Return why an engine has not answered if the text is that of the proxy before it; None if an engine wrote it."""
    if not text.startswith(_NO_ANSWER):
        return None
    cause = _CAUSE.search(text)
    return "no connection" if cause is None else scrub(cause["cause"]).decode(errors="replace").strip()
