"""How large a prompt is, in every form the APIs take it: exact token counts, and bytes of text to be estimated.

Texts are counted in UTF-8 bytes, which vary far less per token between languages than characters or words do:
byte-pair tokenizers make a token of 4 to 4.5 bytes of English, 3 to 4.5 of Chinese or Japanese, 3 to 4 of code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from dp_extproc.request.path import Api

MEDIA_TOKENS: Final = 1024
"""Taken for an image, audio or video part. Vision models make about one token of 28 x 28 pixels (Qwen2-VL), so this
is the order of magnitude of one picture; its base64 text says nothing of its tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The size of a request's prompt or, summed up, of its batch of prompts."""

    text_bytes: int
    tokens: int
    """Known without estimating: token ids, and the flat count of media parts."""
    batch: int | None
    """How many prompts a list form holds; None for the scalar form. A list of one is a batch of 1."""


class _Part(msgspec.Struct):
    type: str = ""
    text: str | None = None
    thinking: str | None = None
    input: msgspec.Raw = msgspec.Raw(b"")
    content: msgspec.Raw = msgspec.Raw(b"")


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"")
    arguments: str | None = None
    output: msgspec.Raw = msgspec.Raw(b"")


_TEXT_TYPES: Final = frozenset({
    "text", "input_text", "output_text", "refusal", "summary_text", "thinking", "redacted_thinking", "tool_use",
    "tool_result", "",
})  # fmt: skip

_prompt: Final = msgspec.json.Decoder(str | list[str | int | list[int]])
_token_ids: Final = msgspec.json.Decoder(list[int | list[int]])
_embeddings: Final = msgspec.json.Decoder(list[list[msgspec.Raw]])
_messages: Final = msgspec.json.Decoder(list[_Message])
_input: Final = msgspec.json.Decoder(str | list[_Message])
_system: Final = msgspec.json.Decoder(str | list[_Part] | None)
_text: Final = msgspec.json.Decoder(str | None)
_objects: Final = msgspec.json.Decoder(list[dict[str, Any]])


class PromptError(ValueError):
    """The prompt is missing or of a wrong type."""

    def __init__(self, param: str, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.param = param
        self.missing = missing


Values = dict[str, msgspec.Raw]


def read_prompt(api: Api, values: Values) -> Prompt:
    """Measure the prompt of a request body.

    Raises:
        PromptError: It is missing, or of a type that no engine accepts.
    """
    return _READERS[api](values)


def _size(text: str | None) -> int:
    if not text:
        return 0
    return len(text) if text.isascii() else len(text.encode())


def _length(raw: msgspec.Raw) -> int:
    return len(memoryview(raw))


def _present(values: Values, key: str) -> msgspec.Raw | None:
    raw = values.get(key)
    return None if raw is None or bytes(memoryview(raw)[:4]) == b"null" else raw


def _read_generate(values: Values) -> Prompt:
    if (raw := _present(values, "text")) is not None:
        return _read_texts_or_ids("text", raw)
    if (raw := _present(values, "input_ids")) is not None:
        try:
            ids = _token_ids.decode(raw)
        except msgspec.DecodeError as error:
            raise PromptError("input_ids", f"input_ids must be token ids or a list of them: {error}") from None
        return _count_ids("input_ids", ids)
    if (raw := _present(values, "input_embeds")) is not None:
        try:
            rows = _embeddings.decode(raw)
        except msgspec.DecodeError as error:
            raise PromptError("input_embeds", f"input_embeds must be rows of numbers: {error}") from None
        batched = bool(rows) and bool(rows[0]) and bytes(memoryview(rows[0][0])[:1]) == b"["
        if batched:
            return Prompt(0, sum(len(item) for item in rows), len(rows))
        return Prompt(0, len(rows), None)
    raise PromptError("text", "one of text, input_ids and input_embeds is needed", missing=True)


def _read_completions(values: Values) -> Prompt:
    if (raw := _present(values, "prompt")) is None:
        raise PromptError("prompt", "prompt is needed", missing=True)
    return _read_texts_or_ids("prompt", raw)


def _read_texts_or_ids(param: str, raw: msgspec.Raw) -> Prompt:
    try:
        prompt = _prompt.decode(raw)
    except msgspec.DecodeError as error:
        raise PromptError(param, f"{param} must be a string, token ids, or a list of either: {error}") from None
    if isinstance(prompt, str):
        return Prompt(_size(prompt), 0, None)
    texts = [item for item in prompt if isinstance(item, str)]
    if texts:
        if len(texts) < len(prompt):
            raise PromptError(param, f"{param} mixes strings and token ids; send one kind")
        return Prompt(sum(map(_size, texts)), 0, len(texts))
    return _count_ids(param, [item for item in prompt if not isinstance(item, str)])


def _count_ids(param: str, ids: list[int | list[int]]) -> Prompt:
    lists = [item for item in ids if isinstance(item, list)]
    if not lists:
        if not ids:
            raise PromptError(param, f"{param} is empty", missing=True)
        return Prompt(0, len(ids), None)
    if len(lists) < len(ids):
        raise PromptError(param, f"{param} mixes token ids and lists of token ids; send one kind")
    return Prompt(0, sum(map(len, lists)), len(lists))


def _read_chat(values: Values) -> Prompt:
    return _sum_messages("messages", _present(values, "messages"), values, ())


def _read_anthropic(values: Values) -> Prompt:
    parts: list[_Part] = []
    size = 0
    if (raw := _present(values, "system")) is not None:
        try:
            system = _system.decode(raw)
        except msgspec.DecodeError as error:
            raise PromptError("system", f"system must be a string or a list of text blocks: {error}") from None
        if isinstance(system, str):
            size = _size(system)
        else:
            parts = system or []
    return _sum_messages("messages", _present(values, "messages"), values, parts, size)


def _read_responses(values: Values) -> Prompt:
    if (raw := _present(values, "input")) is None:
        raise PromptError("input", "input is needed", missing=True)
    try:
        instructions = _text.decode(values.get("instructions", _NULL))
    except msgspec.DecodeError:
        raise PromptError("instructions", "instructions must be a string") from None
    size = _size(instructions)
    if bytes(memoryview(raw)[:1]) == b'"':
        return Prompt(size + _size(_text.decode(raw)) + _tools(values), 0, None)
    return _sum_messages("input", raw, values, (), size)


def _sum_messages(
    param: str, raw: msgspec.Raw | None, values: Values, more: list[_Part] | tuple[()], size: int = 0
) -> Prompt:
    if raw is None:
        raise PromptError(param, f"{param} is needed", missing=True)
    try:
        messages = _messages.decode(raw)
    except msgspec.DecodeError:
        # A form of content that is not known here is the engine's to judge; its text is all that can be counted.
        try:
            return Prompt(size + _any_text(_objects.decode(raw)) + _tools(values), 0, None)
        except msgspec.DecodeError as error:
            raise PromptError(param, f"{param} must be a list of objects: {error}") from None
    tokens = 0
    part_size, part_tokens = _sum_parts(more)
    size, tokens = size + part_size, tokens + part_tokens
    for message in messages:
        content = message.content
        if isinstance(content, str):
            size += _size(content)
        elif content:
            part_size, part_tokens = _sum_parts(content)
            size, tokens = size + part_size, tokens + part_tokens
        size += _size(message.reasoning_content) + _length(message.tool_calls)
        size += _size(message.arguments) + _length(message.output)
    return Prompt(size + _tools(values), tokens, None)


def _sum_parts(parts: list[_Part] | tuple[()]) -> tuple[int, int]:
    size = tokens = 0
    for part in parts:
        if part.type in _TEXT_TYPES:
            size += _size(part.text) + _size(part.thinking) + _length(part.input) + _length(part.content)
        else:
            tokens += MEDIA_TOKENS
    return size, tokens


def _tools(values: Values) -> int:
    """Tool definitions become part of the prompt through the chat template, nearly as they stand."""
    raw = values.get("tools")
    return 0 if raw is None else _length(raw)


def _any_text(value: Any) -> int:
    if isinstance(value, str):
        return _size(value)
    if isinstance(value, dict):
        return sum(_any_text(item) for key, item in value.items() if not key.endswith("url"))
    if isinstance(value, list):
        return sum(map(_any_text, value))
    return 0


_NULL: Final = msgspec.Raw(b"null")

_READERS: Final[dict[Api, Callable[[Values], Prompt]]] = {
    Api.GENERATE: _read_generate,
    Api.COMPLETIONS: _read_completions,
    Api.CHAT: _read_chat,
    Api.RESPONSES: _read_responses,
    Api.MESSAGES: _read_anthropic,
}
