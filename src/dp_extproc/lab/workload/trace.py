"""Describe requests as a trace: when they arrive, how long they are, and which beginnings their prompts share."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct


class Language(StrEnum):
    """The language of a prompt. It changes the size in bytes of so many tokens."""

    ENGLISH = "en"
    CHINESE = "zh"


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a prompt. Prompts share a prefix as far as their leading segments are equal."""

    text: int
    """Number of the text; segments with the same number are the same."""
    tokens: int


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    arrival: float
    """Seconds since the start; in a closed loop only the order counts."""
    prompt: tuple[Segment, ...]
    output_tokens: int
    session: int | None = None
    """The conversation that it belongs to."""
    language: Language = Language.ENGLISH

    @property
    def prompt_tokens(self) -> int:
        return sum(segment.tokens for segment in self.prompt)


class TraceError(ValueError):
    """A trace file that cannot be read; the message has every bad line."""


class _Line(Struct, forbid_unknown_fields=True):
    arrival: Annotated[float, Meta(ge=0)]
    prompt_tokens: Annotated[int, Meta(ge=1)]
    output_tokens: Annotated[int, Meta(ge=1)]
    session: int | None = None
    prompt: list[tuple[Annotated[int, Meta(ge=0, lt=1 << 32)], Annotated[int, Meta(ge=1)]]] | None = None
    """Segments, if prompts share beginnings: ``[[text, tokens], ...]``."""
    language: Language = Language.ENGLISH


_lines = msgspec.json.Decoder(_Line)
_OWN_TEXTS = 1 << 31
"""Numbers of texts from here on belong to prompts that share nothing."""
_SHOWN = 10
"""Bad lines that an error has at most."""


def read_trace(lines: Iterable[str]) -> list[TraceRequest]:
    """Read a trace: one JSON object per line, in any order of arrival.

    ``{"arrival": 0.5, "prompt_tokens": 900, "output_tokens": 120}``, optionally with ``session`` (a number),
    ``language`` (``en`` or ``zh``) and ``prompt``, the prompt's segments, which then must add up to its tokens.

    Raises:
        TraceError: Some lines are wrong, or there is none.
    """
    requests: list[TraceRequest] = []
    wrong: list[str] = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = _lines.decode(text)
        except msgspec.DecodeError as error:
            wrong.append(f"line {number}: {error}")
            continue
        parts = line.prompt or [(_OWN_TEXTS + number, line.prompt_tokens)]
        if sum(tokens for _, tokens in parts) != line.prompt_tokens:
            wrong.append(f"line {number}: the segments of prompt do not add up to prompt_tokens")
            continue
        segments = tuple(Segment(text, tokens) for text, tokens in parts)
        requests.append(TraceRequest(line.arrival, segments, line.output_tokens, line.session, line.language))
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise TraceError("\n".join([*wrong[:_SHOWN], *more]))
    if not requests:
        raise TraceError("the trace has no requests")
    return sorted(requests, key=lambda request: request.arrival)


def write_trace(requests: Sequence[TraceRequest]) -> Iterator[str]:
    """Write a trace line by line, as :func:`read_trace` reads it."""
    for request in requests:
        segments = [(segment.text, segment.tokens) for segment in request.prompt]
        tokens, output = request.prompt_tokens, request.output_tokens
        line = _Line(request.arrival, tokens, output, request.session, segments, request.language)
        yield msgspec.json.encode(line).decode() + "\n"
