"""What is refused of a request before its body is read."""

from typing import Final

from dp_extproc.request.rejection import Reason, Rejection

_MAX_LENGTH_DIGITS: Final = 20
"""Of a content-length; as many as a number of 64 bits has."""

NO_BODY: Final = Rejection(400, Reason.EMPTY_BODY, "the request has no body; send a JSON object")


def refuse_by_headers(headers: dict[str, str], max_body: int) -> Rejection | None:
    """Refuse before the body has come what its headers already tell."""
    encoding = headers.get("content-encoding")
    if encoding is not None and encoding.strip().lower() not in {"", "identity"}:
        message = f"request bodies with content-encoding {encoding!r} cannot be read; send the JSON uncompressed"
        return Rejection(415, Reason.COMPRESSED_BODY, message)
    media = headers.get("content-type", "application/json")
    if media != "application/json" and not _is_json(media):
        return Rejection(415, Reason.NOT_JSON, f"content-type must be application/json, not {media[:100]!r}")
    length = headers.get("content-length", "")
    # Python refuses to read numbers of thousands of digits.
    if length.isdecimal() and (len(length) > _MAX_LENGTH_DIGITS or int(length) > max_body):
        return too_large(max_body)
    return None


def _is_json(content_type: str) -> bool:
    media = content_type.partition(";")[0].strip().lower()
    return media == "application/json" or media.endswith("+json")


def too_large(max_body: int) -> Rejection:
    return Rejection(413, Reason.BODY_TOO_LARGE, f"the request body is larger than {max_body} bytes")
