"""Test the texts of prompts: as many tokens as the trace has, by the stand-in's own count."""

from itertools import pairwise

import pytest

from dp_extproc.lab.engine.text import chat_prompt, count_tokens, text_prompt
from dp_extproc.lab.workload.generate import NAMES, SESSIONS, make_trace
from dp_extproc.lab.workload.texts import chat_messages, segment_text
from dp_extproc.lab.workload.trace import Language, Segment, TraceRequest


@pytest.mark.parametrize("language", Language)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 100, 1001, 40_000])
def test_segment_has_exactly_its_tokens(language: Language, tokens: int) -> None:
    """This holds in both languages, and for short segments."""
    assert count_tokens(text_prompt(segment_text(Segment(123_456_789, tokens), language))) == tokens


@pytest.mark.parametrize("name", [name for name in NAMES if name != "long"])
def test_conversation_has_exactly_the_tokens_of_its_request(name: str) -> None:
    """The additions of the chat template count, from eight tokens a segment on."""
    trace = [
        request for request in make_trace(name, 40, 5, seed=2) if min(segment.tokens for segment in request.prompt) >= 8
    ]
    assert len(trace) > 30
    for request in trace:
        assert count_tokens(chat_prompt(chat_messages(request))) == request.prompt_tokens


def test_chinese_text_has_characters_of_three_bytes() -> None:
    """So it has fewer characters for the same tokens, and no spaces."""
    text = segment_text(Segment(5, 3000), Language.CHINESE)
    assert len(text) < 4100
    assert len(text.split()) <= 2


def test_segments_differ_from_their_first_bytes() -> None:
    """Equal segments may be found in a prefix cache, others may not."""
    assert segment_text(Segment(5, 30)) == segment_text(Segment(5, 30))
    assert segment_text(Segment(5, 30))[:4] != segment_text(Segment(6, 30))[:4]
    assert segment_text(Segment(5, 30)).startswith(segment_text(Segment(5, 20)))


def test_roles_take_turns_and_end_with_the_user() -> None:
    """System, user, assistant, user; a single message is a user's."""
    segments = tuple(Segment(number, 20) for number in range(4))
    roles = [message["role"] for message in chat_messages(TraceRequest(0, segments, 5))]
    assert roles == ["system", "user", "assistant", "user"]
    assert [message["role"] for message in chat_messages(TraceRequest(0, segments[:1], 5))] == ["user"]


def test_next_turn_repeats_all_messages() -> None:
    """The messages of a turn are the first messages of the next one, to the letter."""
    turns = [request for request in make_trace(SESSIONS, 60, 5, seed=1) if request.session == 0]
    assert len(turns) >= 3
    for before, after in pairwise(turns):
        messages = chat_messages(before)
        assert chat_messages(after)[: len(messages)] == messages
