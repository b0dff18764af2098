"""The log probabilities of an echoed prompt on /v1/completions, which only the prefill leg's response has.

With ``echo`` and ``logprobs`` an aggregated engine of SGLang has the prompt's tokens before those of the output in
``logprobs`` of each choice, in streams in the first event of each choice (serving_completions.py). A decode engine has
the tokens of the output there. A prefill engine has those of the prompt, and behind them the first one of the output.
"""

from typing import Final

from msgspec import Raw, Struct, field

from dp_extproc.response.merging import (
    UNREADABLE,
    Members,
    MergeError,
    read_index,
    read_list,
    read_object,
    write_object,
)

_LISTS: Final = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
"""Members of ``logprobs`` with one entry for each token."""

_Lists = dict[str, list[Raw]]
"""Entries of the tokens of a prompt."""


class EchoedLogprobs(Struct):
    """Log probabilities of each prompt of a request."""

    prompts: dict[int, _Lists]
    """Entries by the index of the choice."""
    _begun: set[int] = field(default_factory=set)
    """Choices of a stream whose first event is merged."""

    def whole(self, response: bytes) -> bytes:
        found = read_object(response)
        if (choices := self._merge(found)) is None or len(choices) != len(self.prompts):
            raise MergeError("the legs' responses are not of the same number of prompts")
        return write_object({**found, "choices": choices})

    def event(self, event: Members) -> bytes | None:
        choices = self._merge(event)
        return None if choices is None else write_object({**event, "choices": choices})

    def _merge(self, found: Members) -> list[Raw | Members] | None:
        """Merge the choices of a response or of an event; None if nothing changes."""
        choices: list[Raw | Members] = []
        changed = False
        for raw in read_list(found["choices"]) if "choices" in found else ():
            choice = read_object(raw)
            index = read_index(choice.get("index", Raw(b"0")))
            choices.append(raw)
            if index not in self._begun:
                choices[-1] = self._merge_choice(choice, index)
                changed = True
        return choices if changed else None

    def _merge_choice(self, choice: Members, index: int) -> Members:
        if index not in self.prompts:
            raise MergeError("a choice is of a prompt that the prefill leg's response does not have")
        try:
            logprobs = read_object(choice.get("logprobs", Raw(b"null")))
        except UNREADABLE:
            raise MergeError("decode's response has no log probabilities") from None
        self._begun.add(index)
        merged = {
            key: [*entries, *read_list(logprobs.get(key, Raw(b"[]")))] for key, entries in self.prompts[index].items()
        }
        return {**choice, "logprobs": Raw(write_object({**logprobs, **merged}))}


def read_echo(response: bytes) -> EchoedLogprobs | None:
    """Read the prefill leg's response; None if it has no log probabilities of each token of the prompts."""
    try:
        found = read_object(response)
        choices = [read_object(each) for each in read_list(found["choices"])]
        prompt_tokens = read_index(read_object(found["usage"])["prompt_tokens"])
        prompts: dict[int, _Lists] = {}
        for choice in choices:
            logprobs = read_object(choice["logprobs"])
            lists = {key: read_list(logprobs[key]) for key in _LISTS if key in logprobs}
            # Prefill computes one token of the output.
            prompts[read_index(choice["index"])] = {key: entries[:-1] for key, entries in lists.items()}
        counted = [sum(len(lists[key]) for lists in prompts.values()) for key in ("tokens", "token_logprobs")]
    except (*UNREADABLE, KeyError):
        return None
    return EchoedLogprobs(prompts) if counted == [prompt_tokens] * 2 else None
