"""The shapes of the bodies of the five APIs (see :data:`SHAPES`). Members that are not listed here are skipped unread.

Every field may be null, as client libraries send nulls for what was not set. Some fields are listed only so that a
wrong type is refused before any engine reads it.
"""

from typing import Annotated, Any, Final

from msgspec import Meta, Raw, Struct

from dp_extproc.request.path import Api

NO_VALUE: Final = Raw(b"")


class Part(Struct):
    """A part of the content of a message, in any API."""

    type: str = ""
    text: str | None = None
    thinking: str | None = None
    input: Raw = NO_VALUE
    content: Raw = NO_VALUE
    image_url: Raw = NO_VALUE
    video_url: Raw = NO_VALUE
    audio_url: Raw = NO_VALUE
    input_audio: Raw = NO_VALUE
    source: Raw = NO_VALUE
    """The image or document of /v1/messages."""


class Message(Struct):
    """A message of a conversation, or an item of the input of /v1/responses."""

    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: Raw = NO_VALUE
    arguments: str | None = None
    output: Raw = NO_VALUE


Unknown = dict[str, Any]
"""A message whose content has an unknown form, which the engine has to judge; see the classes named after it."""

LARGEST_ID: Final = 2**31 - 1
"""The largest valid token id; no vocabulary is so large."""

TokenId = Annotated[int, Meta(ge=0, le=LARGEST_ID)]
"""A token id. SGLang looks up its row of the embedding unchecked, and its process ends if there is none."""

TextsOrIds = str | list[str | TokenId | list[TokenId]]


class Body(Struct):
    """The fields that all APIs have. Values of any type are read by :mod:`dp_extproc.request.lenient`."""

    model: str | None = None
    stream: Any = None
    priority: Any = None


class OpenAIBody(Body):
    n: Any = None


class SamplingParams(Struct):
    n: Any = 1
    max_new_tokens: float | None = None
    """Only of a number is its sign looked up in all releases (``sampling_params.py``)."""
    stop_token_ids: Raw = NO_VALUE


class Generate(Body):
    model: Any = None
    """No field of SGLang, but it selects a pool if it is a text."""
    text: TextsOrIds | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    input_embeds: list[Raw] | None = None
    image_data: Raw = NO_VALUE
    audio_data: Raw = NO_VALUE
    video_data: Raw = NO_VALUE
    sampling_params: SamplingParams | list[SamplingParams] | None = None

    @property
    def samplings(self) -> list[SamplingParams]:
        """The sampling parameters of all prompts, or those of each prompt of a batch."""
        given = self.sampling_params or []
        return given if isinstance(given, list) else [given]


class Completions(OpenAIBody):
    prompt: TextsOrIds | None = None


class Chat(OpenAIBody):
    messages: list[Message] | None = None
    input_ids: list[TokenId] | None = None
    """An extension of SGLang: the prompt in place of what the chat template would make of the messages."""
    tools: Raw = NO_VALUE


class ChatUnknown(Chat):
    messages: list[Unknown] | None = None  # type: ignore[assignment]


class Messages(Body):
    system: str | list[Part] | None = None
    messages: list[Message] | None = None
    tools: Raw = NO_VALUE


class MessagesUnknown(Messages):
    messages: list[Unknown] | None = None  # type: ignore[assignment]


class Responses(Body):
    input: str | list[Message] | None = None
    instructions: str | None = None
    tools: Raw = NO_VALUE


class ResponsesUnknown(Responses):
    input: str | list[Unknown] | None = None  # type: ignore[assignment]


SHAPES: Final[dict[Api, tuple[type[Body], ...]]] = {
    Api.GENERATE: (Generate,),
    Api.COMPLETIONS: (Completions,),
    Api.CHAT: (Chat, ChatUnknown),
    Api.RESPONSES: (Responses, ResponsesUnknown),
    Api.MESSAGES: (Messages, MessagesUnknown),
}
"""The shapes of each API, in the order in which they are tried."""
