"""Token ids beside the prompt: finds those that no vocabulary has, and that would end the process of an engine.

The ids of prompts are checked when they are read, by their type in :mod:`dp_extproc.request.shapes`. The lists of these
fields are small, and engines take them in more forms (``"5"``, ``5.0``), so they are decoded only if they look wrong.

What an invalid id does to SGLang, by field:

- ``stop_token_ids``: SGLang scatters it into a row of the vocabulary as soon as any request of the same batch asks for
  ``min_new_tokens`` (``penaltylib/min_new_tokens.py``). This ends the process in all releases.
- ``token_ids_logprob``: 0.5.14 and later refuse it. Earlier releases index a row with it, which ends the process.

The keys of ``logit_bias`` are refused by every release.
"""

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Raw

from dp_extproc.request.path import Api
from dp_extproc.request.shapes import LARGEST_ID, Body, Generate, TokenId

STOP_IDS: Final = "stop_token_ids"
LOGPROBS_OF_IDS: Final = "token_ids_logprob"

_FIELD: Final = {Api.GENERATE: LOGPROBS_OF_IDS, Api.COMPLETIONS: STOP_IDS, Api.CHAT: STOP_IDS}
"""The member of the body that has token ids. ``/generate`` also has stop ids, among its sampling parameters."""
_SUSPECT: Final = re.compile(rb"[-eE_\\]|[0-9]{10}")
"""A sign, an exponent, or as many digits as the largest id has; or an escape in a text that may hide one of these."""
_NUMBER_IN_TEXT: Final = r"^\s*\+?[0-9]{1,9}(\.0*)?\s*$"

_Lax = TokenId | Annotated[float, Meta(ge=0, le=LARGEST_ID)] | Annotated[str, Meta(pattern=_NUMBER_IN_TEXT)] | None
_Ids = _Lax | list[_Lax | list[_Lax]]
"""Ids in every form that some release takes, also as a list for each prompt of a batch."""
_ids: Final[msgspec.json.Decoder[_Ids]] = msgspec.json.Decoder(_Ids)


def find_invalid_ids(fields: Body, api: Api, values: dict[str, Raw]) -> str | None:
    """Return the name of a field with an id that no vocabulary has; None if there is none.

    Raises:
        msgspec.DecodeError: A value is no JSON.
        RecursionError: It is nested too deeply.
    """
    name = _FIELD.get(api)
    if name is not None and name in values and _has_invalid_id(values[name]):
        return name
    if isinstance(fields, Generate) and any(_has_invalid_id(each.stop_token_ids) for each in fields.samplings):
        return STOP_IDS
    return None


def _has_invalid_id(raw: Raw) -> bool:
    if _SUSPECT.search(memoryview(raw)) is None:
        return False
    try:
        _ids.decode(raw)
    except msgspec.ValidationError:
        return True
    return False
