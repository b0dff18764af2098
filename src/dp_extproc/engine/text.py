"""The "model": how many tokens a prompt has, and which tokens come out. Deterministic, so that any two engines agree.

A text has as many tokens as its UTF-8 bytes divided by four, rounded up; token ids count one each; a chat has the
tokens of its texts and of its tools, plus four per message and three for the answer's head; an image counts 256.
"""

from typing import Any, Final

import msgspec

BYTES_PER_TOKEN: Final = 4
TOKENS_PER_MESSAGE: Final = 4
TOKENS_FOR_ANSWER: Final = 3
TOKENS_PER_IMAGE: Final = 256

_WORDS: Final = (
    *("the", "ranks", "of", "one", "server", "take", "their", "steps", "together", "and", "a", "step", "costs"),
    *("what", "its", "fullest", "rank", "has", "to", "do"),
)


def text_tokens(text: str) -> int:
    """Count the tokens of a text; at least one."""
    return max(1, -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN))


def output_id(prompt_tokens: int, position: int) -> int:
    """Choose the output token at *position* of a prompt of this length."""
    return (prompt_tokens * 7 + position) % len(_WORDS)


def output_text(token_id: int) -> str:
    """Spell a token: one word with a space before it."""
    return f" {_WORDS[token_id]}"


def chat_tokens(messages: list[Any], tools: Any = None) -> int:
    """Count the tokens of a conversation in OpenAI's or Anthropic's form."""
    total = TOKENS_FOR_ANSWER + (text_tokens(msgspec.json.encode(tools).decode()) if tools else 0)
    return total + sum(TOKENS_PER_MESSAGE + _message_tokens(message) for message in messages)


def _message_tokens(message: Any) -> int:
    if not isinstance(message, dict):
        return text_tokens(str(message))
    calls = message.get("tool_calls")
    return _content_tokens(message.get("content")) + (_content_tokens(str(calls)) if calls else 0)


def _content_tokens(content: Any) -> int:
    if isinstance(content, str):
        return text_tokens(content) if content else 0
    if not isinstance(content, list):
        return 0
    return sum(_part_tokens(part) for part in content)


def _part_tokens(part: Any) -> int:
    if isinstance(part, str):
        return text_tokens(part)
    if not isinstance(part, dict):
        return 0
    if isinstance(part.get("text"), str):
        return text_tokens(part["text"])
    if isinstance(part.get("content"), str | list):
        return _content_tokens(part["content"])
    return TOKENS_PER_IMAGE
