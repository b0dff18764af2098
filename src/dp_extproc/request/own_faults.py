"""Finds mistakes in a body of ``/generate`` that SGLang answers with 500, as if it had failed itself.

The fields that may be a list for each prompt are looked up by the number of the prompt (``managers/io_struct.py``,
``GenerateReqInput.__getitem__``), in all releases. A list that is too short raises ``IndexError``, and a list where the
request has one prompt goes on to the scheduler as it is. Only ``ValueError`` becomes a 400.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec
from msgspec import Raw

from dp_extproc.request.shapes import Generate

_ONE_EACH: Final = (
    "rid", "return_logprob", "logprob_start_len", "top_logprobs_num", "return_sampling_mask", "sampling_logprobs_mode",
    "lora_path", "custom_logit_processor", "extra_key", "cache_salt",
)  # fmt: skip
"""Fields with one value for all prompts, or a list with one for each prompt of a batch."""
_LISTS_OF_ONE_PROMPT: Final = ("return_hidden_states", "video_data", "audio_data", "modalities")
"""Fields that may be a list for one prompt, too."""
_IDS_EACH: Final = "token_ids_logprob"
"""A field that is a list for all prompts, or a list of lists."""
_ANY_OF_THEM: Final = frozenset((*_ONE_EACH, *_LISTS_OF_ONE_PROMPT, _IDS_EACH))
_values: Final[msgspec.json.Decoder[list[Raw]]] = msgspec.json.Decoder(list[Raw])


class Fault(NamedTuple):
    """A mistake in a field."""

    param: str
    message: str


def find_fault(body: Generate, values: Mapping[str, Raw]) -> Fault | None:
    """Return the first mistake that SGLang would answer with 500; None if there is none.

    *values* has the members of the body by name.
    """
    batch = _batch(body)
    return _fault_of_prompt(body) or _fault_of_sampling(body, batch) or _fault_of_lists(values, batch)


def _batch(body: Generate) -> int | None:
    """Return the number of prompts, as SGLang counts them; None if the request has one that is in no list."""
    if body.text is not None:
        return None if isinstance(body.text, str) else len(body.text)
    if body.input_ids:
        return len(body.input_ids) if isinstance(body.input_ids[0], list) else None
    rows = body.input_embeds or []
    first = _items(rows[0]) if rows else []
    return len(rows) if first and _is_list(first[0]) else None


def _fault_of_prompt(body: Generate) -> Fault | None:
    text, ids, rows = body.text, body.input_ids, body.input_embeds
    if text is None and ids is None:
        if rows is not None and (not rows or not _items(rows[0])):
            return Fault("input_embeds", "input_embeds is empty")
        return None
    if text is None or not ids:
        return None
    if isinstance(text, str):
        if isinstance(ids[0], list):
            return Fault("input_ids", "input_ids is a list of lists, but text is one prompt")
    elif isinstance(ids[0], int):
        return Fault("input_ids", "input_ids is one prompt, but text is a list of prompts")
    elif len(ids) < len(text):
        return Fault("input_ids", f"input_ids has {len(ids)} prompts, but text has {len(text)}")
    return None


def _fault_of_sampling(body: Generate, batch: int | None) -> Fault | None:
    given = body.sampling_params
    if given is None:
        return None
    for each in body.samplings:
        if each.n is None or isinstance(each.n, str | list | dict) or (isinstance(each.n, float) and each.n > 1):
            return Fault("n", "n in sampling_params must be an integer")
    if not isinstance(given, list):
        return None
    if not given:
        return Fault("sampling_params", "sampling_params is an empty list")
    if batch is None and given[0].n <= 1:
        return Fault("sampling_params", _for_one_prompt("sampling_params"))
    return _fault_of_length("sampling_params", len(given), batch)


def _fault_of_lists(values: Mapping[str, Raw], batch: int | None) -> Fault | None:
    if _ANY_OF_THEM.isdisjoint(values):
        return None
    for name in _ONE_EACH:
        if (raw := values.get(name)) is not None and _is_list(raw):
            fault = Fault(name, _for_one_prompt(name)) if batch is None else None
            if fault := fault or _fault_of_length(name, len(_items(raw)), batch):
                return fault
    for name in _LISTS_OF_ONE_PROMPT:
        items = _items(values[name]) if name in values else []
        if items and (fault := _fault_of_length(name, len(items), batch)):
            return fault
    if (raw := values.get(_IDS_EACH)) is not None and (items := _items(raw)) and _is_list(items[0]):
        return _fault_of_length(_IDS_EACH, len(items), batch)
    return None


def _fault_of_length(name: str, length: int, batch: int | None) -> Fault | None:
    if batch is None or length >= batch:
        return None
    return Fault(name, f"{name} has {length} items, but there are {batch} prompts")


def _for_one_prompt(name: str) -> str:
    return f"{name} is a list with an item for each prompt, but the request has one prompt that is in no list"


def _is_list(raw: Raw) -> bool:
    return bytes(memoryview(raw)[:1]) == b"["


def _items(raw: Raw) -> list[Raw]:
    return _values.decode(raw) if _is_list(raw) else []
