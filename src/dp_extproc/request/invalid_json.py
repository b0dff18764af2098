"""Explains why a body is not JSON: what is wrong with it, at which byte, and what to send instead."""

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from typing import Final

from dp_extproc.request.rejection import Reason, Rejection

_MARKS: Final = (
    (BOM_UTF8, "begins with a byte order mark at byte 0; send UTF-8 without it"),
    (BOM_UTF32_LE, "is UTF-32, by the mark at byte 0; send UTF-8"),
    (BOM_UTF32_BE, "is UTF-32, by the mark at byte 0; send UTF-8"),
    (BOM_UTF16_LE, "is UTF-16, by the mark at byte 0; send UTF-8"),
    (BOM_UTF16_BE, "is UTF-16, by the mark at byte 0; send UTF-8"),
)
"""Marks of encodings. That of UTF-32 in little endian begins with that of UTF-16, so it comes first."""
_HIGH: Final = rb"\\u[dD][89abAB][0-9a-fA-F]{2}"
_LOW: Final = rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE: Final = re.compile(
    rb"(?<!\\)(?:\\\\)*(?P<lone>" + _HIGH + rb"(?!" + _LOW + rb")|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})" + _LOW + rb")"
)
"""One half of a surrogate pair without the other, as an escape. Behind an escaped backslash ``u`` is no escape."""
_RAW_SURROGATE: Final = range(0xA0, 0xC0)
"""Second bytes of a surrogate that is written as if it were a character, behind ``0xED``."""
_PREFIX: Final = "JSON is malformed: "
_CHARACTER: Final = re.compile(r"invalid character \(byte (?P<at>\d+)\)$")
_PAIRS: Final = "escape characters above U+FFFF as pairs, or send them as UTF-8"


def explain_invalid_json(text: bytes, error: Exception) -> Rejection:
    """Refuse a body that is not JSON, by the error of the JSON parser."""
    return Rejection(400, Reason.INVALID_JSON, f"the request body {_explain(text, error)}")


def _explain(text: bytes, error: Exception) -> str:
    for mark, found in _MARKS:
        if text.startswith(mark):
            return found
    if (at := text.find(b"\0", 0, 4)) >= 0:
        return f"is UTF-16 or UTF-32, as byte {at} is 0; send UTF-8"
    if isinstance(error, UnicodeDecodeError):
        at = error.start
        if text[at : at + 1] == b"\xed" and text[at + 1 : at + 2] and text[at + 1] in _RAW_SURROGATE:
            return f"is not valid UTF-8: a lone surrogate is at byte {at}; leave it out"
        return f"is not valid UTF-8 (byte {at})"
    problem = str(error).removeprefix(_PREFIX)
    is_truncated = "truncated" in problem
    if (is_truncated or "surrogate" in problem) and (lone := _LONE.search(text)) is not None:
        half, at = lone["lone"].decode(), lone.start("lone")
        return f"is not valid JSON: the surrogate {half} at byte {at} has no other half; {_PAIRS}"
    if is_truncated:
        return f"is not valid JSON: it ends too early, after {len(text)} bytes"
    if (character := _CHARACTER.search(problem)) is not None:
        at = int(character["at"])
        problem = f"invalid character {text[at : at + 1].decode('latin-1')!r} (byte {at})"
    return f"is not valid JSON: {problem}"
