"""Be the "model": make the tokens of prompts and answers. Deterministic, so that any two engines agree.

Four UTF-8 bytes of a text are a token, the last one padded; token ids are one each; a chat has the tokens of its tools
and of its texts, with four in front of each message and three for the head of the answer, which are those of an
assistant's message; an image has 256. Prompts have the form of the prefix cache, four bytes per token.
"""

import array
import hashlib
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from dp_extproc.lab.engine.scheduler.prefix_cache import TOKEN_BYTES

TOKENS_PER_MESSAGE: Final = 4
TOKENS_FOR_ANSWER: Final = 3
TOKENS_PER_IMAGE: Final = 256

_WORDS: Final = (
    *("the", "ranks", "of", "one", "server", "take", "their", "steps", "together", "and", "a", "step", "costs"),
    *("what", "its", "fullest", "rank", "has", "to", "do"),
)


def count_tokens(prompt: bytes) -> int:
    """Count the tokens of a prompt."""
    return len(prompt) // TOKEN_BYTES


def text_prompt(text: str) -> bytes:
    """Return the tokens of a text; at least one."""
    raw = text.encode("utf-8", "surrogatepass")
    return raw.ljust(max(1, -(-len(raw) // TOKEN_BYTES)) * TOKEN_BYTES, b"\0")


def ids_prompt(ids: list[int]) -> bytes:
    """Return the tokens of *ids*; of ids beyond 32 bits the lower ones count."""
    try:
        return array.array("I", ids).tobytes()
    except OverflowError:
        return array.array("I", [each & 0xFFFFFFFF for each in ids]).tobytes()


def output_id(prompt_tokens: int, position: int) -> int:
    """Choose the output token at *position* of a prompt of this length."""
    return (prompt_tokens * 7 + position) % len(_WORDS)


def output_text(token_id: int) -> str:
    """Spell a token: one word with a space before it."""
    return f" {_WORDS[token_id]}"


def chat_prompt(messages: list[Any], tools: Any = None) -> bytes:
    """Return the tokens of a conversation in OpenAI's or Anthropic's form."""
    head = text_prompt(msgspec.json.encode(tools).decode()) if tools else b""
    answer = _frame("assistant")[: TOKENS_FOR_ANSWER * TOKEN_BYTES]
    return b"".join((head, *_messages(messages), answer))


def _messages(messages: list[Any]) -> Iterable[bytes]:
    for message in messages:
        if not isinstance(message, dict):
            yield _frame("")
            yield text_prompt(str(message))
            continue
        yield _frame(message.get("role"))
        yield _content(message.get("content"))
        if calls := message.get("tool_calls"):
            yield text_prompt(str(calls))


def _frame(role: Any) -> bytes:
    size = TOKENS_PER_MESSAGE * TOKEN_BYTES
    return f"<|{role}|>".encode("utf-8", "surrogatepass")[:size].ljust(size, b"\0")


def _content(content: Any) -> bytes:
    if isinstance(content, str):
        return text_prompt(content) if content else b""
    if not isinstance(content, list):
        return b""
    return b"".join(map(_part, content))


def _part(part: Any) -> bytes:
    if isinstance(part, str):
        return text_prompt(part)
    if not isinstance(part, dict):
        return b""
    if isinstance(part.get("text"), str):
        return text_prompt(part["text"])
    if isinstance(part.get("content"), str | list):
        return _content(part["content"])
    digest = hashlib.sha256(msgspec.json.encode(part)).digest()
    return digest * (TOKENS_PER_IMAGE * TOKEN_BYTES // len(digest))
