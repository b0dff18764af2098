"""Write the text of a prompt: as many tokens as the trace has, by the stand-in's count of four UTF-8 bytes each.

The same segment is the same text wherever it occurs, and different segments differ from their first bytes on.
"""

from functools import lru_cache
from random import Random
from typing import Any, Final

from dp_extproc.lab.engine.scheduler.prefix_cache import TOKEN_BYTES
from dp_extproc.lab.engine.text import TOKENS_FOR_ANSWER, TOKENS_PER_MESSAGE
from dp_extproc.lab.workload.trace import Language, Segment, TraceRequest

_ENGLISH: Final = tuple(
    """
    the of and to in is that it was for on are with as his they at be this from have or by one had not but what all were
    when we there can an your which their said if do will each about how up out them then she many some so these would
    other into has more her two like him see time could no make than first been its who now people my made over did down
    only way find use may water long little very after words called just where most know
    """.split()  # noqa: SIM905 - a hundred quoted words would be no easier to read
)
_CHINESE: Final = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会"
    "可主发年动同工也能下过子说产种面而方后多定行学法所民得经十三之进着等部度家"
)
_CHINESE_BYTES: Final = 3
_REMEMBERED: Final = 512
"""Texts that are cached, because prompts share them."""


@lru_cache(_REMEMBERED)
def segment_text(segment: Segment, language: Language = Language.ENGLISH) -> str:
    """Write a segment."""
    size = segment.tokens * TOKEN_BYTES
    rng = Random(segment.text)
    head = f"{segment.text} "
    if language is Language.CHINESE:
        count = max(0, size - len(head)) // _CHINESE_BYTES
        text = head + "".join(rng.choices(_CHINESE, k=count))
        return text[:size] if size < len(head) else text + "." * (size - len(head) - count * _CHINESE_BYTES)
    words = rng.choices(_ENGLISH, k=size // 3 + 1)  # with its space a word has at least three bytes, "a" is not there
    return (head + " ".join(words))[:size]


def chat_messages(request: TraceRequest) -> list[dict[str, Any]]:
    """Write a prompt as a conversation, a message for each segment; the last is a user's, before it they take turns.

    What the chat template adds to a message is part of its segment's tokens, and the head of the answer is part of the
    first one's: so a turn has the same text when others have followed it. A segment that is not longer than what is
    added becomes a message of one token.
    """
    last = len(request.prompt) - 1
    messages = []
    for position, segment in enumerate(request.prompt):
        added = TOKENS_PER_MESSAGE + (0 if position else TOKENS_FOR_ANSWER)
        text = segment_text(Segment(segment.text, max(1, segment.tokens - added)), request.language)
        role = "user" if (last - position) % 2 == 0 else "assistant" if position else "system"
        messages.append({"role": role, "content": text})
    return messages
