"""Measures the size of a prompt, in every form that the APIs take: in tokens if it can, else in bytes of text.

Texts are counted in UTF-8 bytes, which vary far less per token between languages than characters or words do.
Byte-pair tokenizers make a token of 4 to 4.5 bytes of English, 3 to 4.5 of Chinese or Japanese, and 3 to 4 of code.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from dp_extproc.request.media import image_tokens, sound_tokens, video_tokens
from dp_extproc.request.shapes import Body, Chat, Completions, Generate, Message, Messages, Part, Responses, TextsOrIds

_TEXT_TYPES: Final = frozenset({
    "text", "input_text", "output_text", "refusal", "summary_text", "thinking", "redacted_thinking", "tool_use",
    "tool_result", "",
})  # fmt: skip

_MEDIA_KEYS: Final = ("url", "data")
"""The ends of the keys of media, whether in base64 or by address."""

_values: Final[msgspec.json.Decoder[list[Raw]]] = msgspec.json.Decoder(list[Raw])
_MOST_MEDIA: Final = 10_000
"""Most media of one list that are looked at."""
_LIST_OF_LISTS: Final = re.compile(rb"\[\s*\[")
_parts: Final[msgspec.json.Decoder[list[Part]]] = msgspec.json.Decoder(list[Part])


class Prompt(Struct, frozen=True):
    """The size of the prompt of a request, or the sum over its batch of prompts."""

    text_bytes: int
    """UTF-8 bytes of text."""
    tokens: int
    """Tokens besides those of text: token ids, and the estimate of images, sound and video."""
    batch: int | None
    """The number of prompts in the list form; None for the scalar form. A list of one is a batch of 1."""
    has_media: bool = False
    """Whether a part of ``tokens`` is such an estimate."""


class PromptError(ValueError):
    """The prompt is missing, or mixes forms that no engine takes together."""

    def __init__(self, param: str, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.param = param
        self.missing = missing


def measure(body: Body) -> Prompt:
    """Measure the prompt of a request body.

    Raises:
        PromptError: There is none that an engine would take.
    """
    if isinstance(body, Chat):
        if body.input_ids is not None and body.messages is not None:
            return Prompt(0, len(body.input_ids), None)
        return _measure_messages("messages", body.messages, _length(body.tools))
    if isinstance(body, Completions):
        return _measure_texts_or_ids("prompt", body.prompt)
    if isinstance(body, Generate):
        return _measure_generate(body)
    if isinstance(body, Messages):
        system = body.system or ""
        text_bytes, tokens = (_size(system), 0) if isinstance(system, str) else _measure_parts(system)
        return _measure_messages("messages", body.messages, _length(body.tools) + text_bytes, tokens)
    assert isinstance(body, Responses)  # noqa: S101 - there are no more
    text_bytes = _size(body.instructions) + _length(body.tools)
    if isinstance(body.input, str):
        return Prompt(text_bytes + _size(body.input), 0, None)
    return _measure_messages("input", body.input, text_bytes)


def _size(text: str | None) -> int:
    if not text:
        return 0
    return len(text) if text.isascii() else len(text.encode())


def _length(raw: Raw) -> int:
    return len(memoryview(raw))


def _measure_generate(body: Generate) -> Prompt:
    prompt = _measure_generate_text(body)
    media = sum(
        _measure_media(member, measure_one)
        for member, measure_one in (
            (body.image_data, image_tokens), (body.audio_data, sound_tokens), (body.video_data, video_tokens)
        )
    )  # fmt: skip
    return replace(prompt, tokens=prompt.tokens + media, has_media=True) if media else prompt


def _measure_generate_text(body: Generate) -> Prompt:
    if body.text is not None:
        prompt = _measure_texts_or_ids("text", body.text)
        if body.input_ids is None:
            return prompt
        # The text only decides whether it is a batch; the ids are computed (``tokenizer_manager.py``).
        return replace(_measure_list("input_ids", body.input_ids), batch=prompt.batch)
    if body.input_ids is not None:
        return _measure_list("input_ids", body.input_ids)
    if body.input_embeds is not None:
        return _measure_embeds(body.input_embeds)
    raise PromptError("text", "one of text, input_ids and input_embeds is needed", missing=True)


def _measure_media(member: Raw, measure_one: Callable[[Raw], int]) -> int:
    """Measure media of /generate: one, a list of them, or a list for each prompt of a batch."""
    view = memoryview(member)
    if not view or bytes(view[:4]) == b"null":
        return 0
    if view[0] != ord("["):
        return measure_one(member)
    return sum(_measure_media(each, measure_one) for each in _values.decode(member)[:_MOST_MEDIA])


def _measure_embeds(rows: list[Raw]) -> Prompt:
    """Count embeddings, which are one list of numbers per token, and one level deeper in a batch."""
    if any(bytes(memoryview(row)[:1]) != b"[" for row in rows):
        raise PromptError("input_embeds", "input_embeds has to be a list of lists of numbers")
    if rows and _LIST_OF_LISTS.match(rows[0]):
        return Prompt(0, sum(len(_values.decode(row)) for row in rows), len(rows))
    return Prompt(0, len(rows), None)


def _measure_texts_or_ids(param: str, prompt: TextsOrIds | None) -> Prompt:
    if prompt is None:
        raise PromptError(param, f"{param} is needed", missing=True)
    return Prompt(_size(prompt), 0, None) if isinstance(prompt, str) else _measure_list(param, prompt)


def _measure_list(param: str, items: Sequence[Any]) -> Prompt:
    """Measure a prompt of token ids, or a batch of texts or of lists of token ids."""
    kinds = set(map(type, items))  # there may be millions
    if not kinds:
        raise PromptError(param, f"{param} is empty", missing=True)
    if len(kinds) > 1:
        raise PromptError(param, f"{param} mixes strings, token ids or lists of token ids; send one kind")
    if kinds == {int}:
        return Prompt(0, len(items), None)
    if kinds == {str}:
        return Prompt(sum(map(_size, items)), 0, len(items))
    return Prompt(0, sum(map(len, items)), len(items))


def _measure_messages(param: str, messages: list[Message] | None, text_bytes: int, tokens: int = 0) -> Prompt:
    """Add the size of a conversation to that of its system prompts and tools.

    Tool definitions and calls become part of the prompt through the chat template, nearly as they stand.
    """
    if messages is None:
        raise PromptError(param, f"{param} is needed", missing=True)
    for message in messages:
        if not isinstance(message, Message):  # of an unknown form, of which only the texts can be counted
            text_bytes += _any_text(message)
            continue
        content = message.content
        if isinstance(content, str):
            text_bytes += _size(content)
        elif content:
            more_bytes, more_tokens = _measure_parts(content)
            text_bytes, tokens = text_bytes + more_bytes, tokens + more_tokens
        more_bytes, more_tokens = _measure_result(message.output)
        text_bytes += more_bytes + _size(message.reasoning_content) + _size(message.arguments)
        text_bytes, tokens = text_bytes + _length(message.tool_calls), tokens + more_tokens
    return Prompt(text_bytes, tokens, None, has_media=tokens > 0)


def _measure_parts(parts: Iterable[Part]) -> tuple[int, int]:
    text_bytes = tokens = 0
    for part in parts:
        if part.type in _TEXT_TYPES:
            more_bytes, more_tokens = _measure_result(part.content)
            text_bytes += more_bytes + _size(part.text) + _size(part.thinking) + _length(part.input)
            tokens += more_tokens
        else:
            tokens += _media_tokens(part)
    return text_bytes, tokens


def _media_tokens(part: Part) -> int:
    """Estimate the tokens of a part that is no text."""
    if memoryview(part.video_url):
        return video_tokens(part.video_url)
    sound = part.input_audio if memoryview(part.input_audio) else part.audio_url
    if memoryview(sound):
        return sound_tokens(sound)
    return image_tokens(part.image_url if memoryview(part.image_url) else part.source)


def _measure_result(result: Raw) -> tuple[int, int]:
    """Measure the result of a tool: by its length, unless it is a list of parts, which may have images."""
    text = memoryview(result)
    if text and text[0] == ord("["):
        try:
            parts = _parts.decode(result)
        except msgspec.ValidationError:
            return len(text), 0
        # The contents of a part are not decoded: each level would be read once more for every level above.
        media = sum(_media_tokens(part) for part in parts if part.type not in _TEXT_TYPES)
        texts = (_size(part.text) + _length(part.content) for part in parts if part.type in _TEXT_TYPES)
        return sum(texts), media
    return len(text), 0


def _any_text(value: Any) -> int:
    if isinstance(value, str):
        return _size(value)
    if isinstance(value, dict):
        return sum(_any_text(item) for key, item in value.items() if not key.endswith(_MEDIA_KEYS))
    if isinstance(value, list):
        return sum(map(_any_text, value))
    return 0
