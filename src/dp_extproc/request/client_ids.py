"""The request ids that a client has given (``rid``), as it expects them in the response.

Engines get other ids, because no two requests may have the same, and no id may be the start of another: schedulers end
requests by the start of their id.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

import msgspec
from msgspec import Raw, Struct

from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import Api

RID: Final = "rid"
_READ_ON: Final = frozenset({Api.GENERATE, Api.COMPLETIONS, Api.CHAT})
"""Paths on which SGLang reads :data:`RID`."""
_ids: Final = msgspec.json.Decoder(str | list[str])
_KEY_BYTES: Final = 16
_SHOWN: Final = 200
"""Characters of a message about a body that cannot be read."""


class ClientIds(Struct, frozen=True):
    """The ids that a client has given to one request."""

    each: tuple[str, ...]
    """That of each prompt."""
    whole: str = ""
    """The single id of the request; empty if it has a list."""

    def prompts(self) -> dict[str, tuple[int, ...]]:
        """Return which prompts each id stands for."""
        indexes: dict[str, list[int]] = {}
        for index, each in enumerate(self.each):
            indexes.setdefault(each, []).append(index)
        found = {each: tuple(of_it) for each, of_it in indexes.items()}
        return {**found, self.whole: tuple(range(len(self.each)))} if self.whole else found


class _Abort(Struct):
    rid: str | None = None
    abort_all: bool = False


_abort: Final = msgspec.json.Decoder(_Abort)


def read_client_ids(api: Api, values: Mapping[str, Raw], batch: int | None) -> ClientIds | None:
    """Read the id of each prompt; None if the client has given none.

    *batch* is the number of prompts in a list, None for a scalar prompt. Of a single id SGLang makes one for each
    prompt of a batch (``_normalize_rid``, io_struct.py).
    """
    if api not in _READ_ON or RID not in values:
        return None
    try:
        given = _ids.decode(values[RID])
    except msgspec.DecodeError:  # null, or what engines refuse
        return None
    whole = given if isinstance(given, str) else ""
    if isinstance(given, str):
        given = [given] if batch is None else [f"{given}_{index}" for index in range(batch)]
    if len(given) != (batch or 1) or not (whole or all(given)):
        return None
    return ClientIds(tuple(given), whole)


def client_key(authorization: str, client_id: str) -> str:
    """Return the name of what a client has sent under an id: a hash, which only the same credentials lead to."""
    text = f"{len(authorization)}:{authorization}{client_id}".encode(errors="surrogatepass")
    return blake2b(text, digest_size=_KEY_BYTES).hexdigest()


def read_abort(text: bytes) -> str | Rejection:
    """Read the body of an ``/abort_request``: the id that it names."""
    try:
        wanted = _abort.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        return Rejection(400, Reason.WRONG_TYPE, f'send a JSON object such as {{"rid": "ID"}}: {error}'[:_SHOWN])
    if wanted.abort_all:
        message = "abort_all ends the requests of all clients, so it is sent to no engine from here; send a rid"
        return Rejection(403, Reason.PATH_REFUSED, message, param="abort_all")
    if not wanted.rid:
        return Rejection(400, Reason.MISSING_FIELD, "name the request to end by the rid that it was sent with", RID)
    return wanted.rid
