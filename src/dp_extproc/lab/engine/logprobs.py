"""Make up log probabilities of tokens, in the shapes of /generate and /v1/completions.

Measured with SGLang 0.5.23: a disaggregated decode engine has those of the answer only, and empty lists for the prompt;
of the first token, which prefill has made, it lacks those of the tokens that the client has named. The prompt's first
token has none, as nothing is before it.
"""

import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.text import output_text

Entry = list[float | int | None]
"""Log probability, token, and its text, which another field asks for."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The log probabilities that are wanted of one sequence."""

    prompt: Sequence[int]
    """Tokens of the prompt, from the first one that the client wants."""
    top: int
    """Likeliest tokens at each place."""
    ids: tuple[int, ...] | None
    """Tokens that the client has named."""

    def members(self, role: Role, output: Sequence[int]) -> dict[str, Any]:
        """Return the members of ``meta_info``, for so many tokens of the answer."""
        prompt = [] if role is Role.DECODE else list(self.prompt)
        members: dict[str, Any] = {
            "input_token_logprobs": [[None if place == 0 else _score(t), t, None] for place, t in enumerate(prompt)],
            "output_token_logprobs": [_entry(token) for token in output],
            "output_token_logprobs_length": len(output),
        }
        kinds = {"top": list(range(self.top)) if self.top else None, "token_ids": self.ids}
        for kind, tokens in kinds.items():
            if tokens is None:
                continue
            here = [_entry(token) for token in tokens]
            of_output: list[Any] = [here] * len(output)
            if role is Role.DECODE and kind == "token_ids" and of_output:
                of_output = [None, *of_output[1:]]
            members[f"input_{kind}_logprobs"] = [None if place == 0 else here for place, _ in enumerate(prompt)]
            members[f"output_{kind}_logprobs"] = of_output
        return members


def read_logprobs(body: dict[str, Any], prompt: bytes, index: int) -> Logprobs | None:
    """Read what a body wants for the prompt at *index*; None for nothing."""

    def field(name: str, nothing: Any) -> Any:
        value = body.get(name)
        if isinstance(value, list) and name != "token_ids_logprob":
            value = value[index] if index < len(value) else None
        return nothing if value is None else value

    if field("return_logprob", nothing=False) is not True:
        return None
    begin = field("logprob_start_len", -1)
    tokens = array.array("I", prompt).tolist()
    ids = body.get("token_ids_logprob")
    if isinstance(ids, list) and ids and isinstance(ids[0], list):
        ids = ids[index]
    return Logprobs(
        tokens[begin:] if begin >= 0 else [], field("top_logprobs_num", 0), None if ids is None else tuple(ids)
    )


def echoed_logprobs(prompt: bytes, top: int, *, echo: bool) -> Logprobs:
    """Return what ``logprobs`` and ``echo`` of /v1/completions ask for (``_convert_to_internal_request``)."""
    return Logprobs(array.array("I", prompt).tolist() if echo and top else [], top, None)


def completion_logprobs(
    wanted: Logprobs, role: Role, output: Sequence[int], *, is_first: bool = True
) -> dict[str, list[Any]]:
    """Return ``logprobs`` of a choice, or of one of its chunks (``to_openai_style_logprobs``).

    The tokens of the prompt come first, but on decode, which has none of them.
    """
    members = wanted.members(role, output)
    kinds = ("input", "output") if is_first else ("output",)
    prompt = [token for _, token, _ in members["input_token_logprobs"]] if is_first else []
    scored = [entry for kind in kinds for entry in members[f"{kind}_token_logprobs"]]
    top = [entries for kind in kinds for entries in members.get(f"{kind}_top_logprobs", [])]
    return {
        "text_offset": [-1] * len(scored),
        "token_logprobs": [score for score, _, _ in scored],
        "tokens": [*map(spell, prompt), *map(output_text, output)],
        "top_logprobs": [
            None if entries is None else {spell(token): score for score, token, _ in entries} for entries in top
        ],
    }


def spell(token: int) -> str:
    """Spell a token of a prompt: four bytes of a text, if they are one, else its number."""
    text = token.to_bytes(4, "little").rstrip(b"\0")
    return text.decode() if text and text.isascii() and text.decode().isprintable() else f"<{token}>"


def _entry(token: int) -> Entry:
    return [_score(token), token, None]


def _score(token: int) -> float:
    return -(1 + token % 97) / 16
