"""The request ids that a client has given (``rid``), as it expects them in the response.

Engines get other ids, because no two requests may have the same, and no id may be the start of another: schedulers end
requests by the start of their id.
"""

from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Raw

from dp_extproc.request.routes import Api

RID: Final = "rid"
_READ_ON: Final = frozenset({Api.GENERATE, Api.COMPLETIONS, Api.CHAT})
"""Paths on which SGLang reads :data:`RID`."""
_ids: Final = msgspec.json.Decoder(str | list[str])


def read_client_ids(api: Api, values: Mapping[str, Raw], batch: int | None) -> tuple[bytes, ...]:
    """Read the id of each prompt, as it stands within quotes in JSON; nothing if the client has given none.

    *batch* is the number of prompts in a list, None for a scalar prompt. Of a single id SGLang makes one for each
    prompt of a batch (``_normalize_rid``, io_struct.py).
    """
    if api not in _READ_ON or RID not in values:
        return ()
    try:
        given = _ids.decode(values[RID])
    except msgspec.DecodeError:  # null, or what engines refuse
        return ()
    if isinstance(given, str):
        given = [given] if batch is None else [f"{given}_{index}" for index in range(batch)]
    if len(given) != (batch or 1) or not all(given):
        return ()
    return tuple(msgspec.json.encode(each)[1:-1] for each in given)
