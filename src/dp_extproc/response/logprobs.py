"""The log probabilities of the prompt on /generate, which only the prefill leg's response has.

A decode engine of SGLang sends none of them (output_streamer.py). With ``return_logprob`` its response has empty lists
where an aggregated engine has those of the prompt, in streams in every event. The lists of the prefill leg are put
before the lists there, as the routers of SGLang do with one of them. (Measured with 0.5.23.)
"""

from typing import Final

import msgspec
from msgspec import Raw, Struct

from dp_extproc.response.merging import (
    UNREADABLE,
    Members,
    MergeError,
    read_index,
    read_list,
    read_object,
    write_object,
)

_LOST: Final = "output_token_ids_logprobs"
"""The only member about the first token that decode lacks too: its response has null there (decode.py)."""


class PromptLogprobs(Struct, frozen=True):
    """Log probabilities of the prompt, or of each prompt of a batch."""

    prompts: tuple[Members, ...]
    """Members of ``meta_info`` by name."""

    def whole(self, response: bytes) -> bytes:
        if response.lstrip()[:1] != b"[":
            found = read_object(response)
            return _merge_object(found, self._only())
        responses = read_list(response)
        if len(responses) != len(self.prompts):
            raise MergeError("the legs' responses are not of the same number of prompts")
        pairs = zip(responses, self.prompts, strict=True)
        return b"[" + b",".join(_merge_object(read_object(each), prompt) for each, prompt in pairs) + b"]"

    def event(self, event: Members) -> bytes | None:
        if "meta_info" not in event:  # an error
            return None
        index = read_index(event["index"]) if "index" in event else 0  # only events of batches have it
        if not 0 <= index < len(self.prompts):
            raise MergeError("an event is of a prompt that the prefill leg's response does not have")
        return _merge_object(event, self.prompts[index])

    def _only(self) -> Members:
        if len(self.prompts) != 1:
            raise MergeError("the legs' responses are not of the same number of prompts")
        return self.prompts[0]


def read_prefill(response: bytes) -> PromptLogprobs | None:
    """Read the prefill leg's response to a request for log probabilities; None if it cannot be parsed."""
    try:
        found = [read_object(each) for each in _objects_of(response)]
        by_index = {read_index(each.get("index", Raw(b"%d" % place))): each for place, each in enumerate(found)}
        metas = [read_object(each["meta_info"]) for _, each in sorted(by_index.items())]
    except (*UNREADABLE, KeyError):
        return None
    prompts = ({key: raw for key, raw in meta.items() if _is_of_prompt(key) or key == _LOST} for meta in metas)
    return PromptLogprobs(tuple(prompts))


def _objects_of(response: bytes) -> list[Raw]:
    """Split a response into those of its prompts. Streams of prefill have one event for each prompt (prefill.py)."""
    if response.startswith(b"data:"):
        lines = (line.removeprefix(b"data:").strip() for line in response.splitlines() if line.startswith(b"data:"))
        return [Raw(line) for line in lines if line != b"[DONE]"]
    return read_list(response) if response.lstrip()[:1] == b"[" else [Raw(response)]


def _merge_object(response: Members, prompt: Members) -> bytes:
    """Merge the response to one prompt.

    Raises:
        msgspec.DecodeError: The ``meta_info`` of the response is no object.
    """
    if "meta_info" in response:
        meta = read_object(response["meta_info"])
        merged = {key: _put_before(value, meta.get(key)) for key, value in prompt.items() if _is_of_prompt(key)}
        if (first := prompt.get(_LOST)) is not None and (rest := meta.get(_LOST)) is not None:
            merged[_LOST] = _fill_first_token(first, rest)
        response["meta_info"] = Raw(msgspec.json.encode(meta | merged))
    return write_object(response)


def _put_before(first: Raw, second: Raw | None) -> Raw:
    """Join two lists. Of other values the first one counts, because decode has null or nothing there."""
    head, tail = bytes(first).strip(), bytes(second or b"").strip()
    if not (head.startswith(b"[") and tail.startswith(b"[")):
        return first if head != b"null" or second is None else second
    parts = [part for part in (head[1:-1].strip(), tail[1:-1].strip()) if part]
    return Raw(b"[" + b",".join(parts) + b"]")


def _fill_first_token(first: Raw, rest: Raw) -> Raw:
    """Put in the first token's value, which prefill has computed and decode lacks."""
    head, tail = bytes(first).strip(), bytes(rest).strip()
    if head.startswith(b"[") and tail.startswith(b"[null"):
        return Raw(b"[" + head[1:-1] + tail.removeprefix(b"[null"))
    return rest


def _is_of_prompt(key: str) -> bool:
    """Return whether a member is of the prompt: input_token_logprobs, input_top_logprobs, also in the flat form."""
    return key.startswith("input_") and "logprobs" in key
