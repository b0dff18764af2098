"""Recognises a request that is sent again: by a retry, by a client library, or by its user."""

from typing import Final

from xxhash import xxh3_128

from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.rewrite import LEG_KEYS

_SEPARATOR: Final = b"\0"
"""A byte that no path has."""


def fingerprint_of(request: InferenceRequest) -> str:
    """Return a hash of a request's path and body, without the members that the service writes itself.

    A request whose body was not read has none: the hash is empty.
    """
    if not request.is_read:
        return ""
    digest = xxh3_128(request.api.value.encode() + _SEPARATOR)
    for piece in request.body.without(LEG_KEYS):
        digest.update(piece)
    return digest.hexdigest()
