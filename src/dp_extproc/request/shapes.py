"""The shapes of the bodies of the five APIs. Members that are not listed here are skipped unread.

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


class Message(Struct):
    """A message of a conversation, or an item of the input of /v1/responses."""

    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: Raw = NO_VALUE
    arguments: str | None = None
    output: Raw = NO_VALUE


Unknown = dict[str, Any]
"""A message whose content has an unknown form, which the engine has to judge."""

LARGEST_ID: Final = 2**31 - 1
"""The largest valid token id; no vocabulary is so large."""

TokenId = Annotated[int, Meta(ge=0, le=LARGEST_ID)]
"""A token id. SGLang looks up its row of the embedding unchecked, and its process ends if there is none."""

TextsOrIds = str | list[str | TokenId | list[TokenId]]


class Body(Struct):
    """The fields that all APIs have."""

    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    priority: int | None = None


class SamplingParams(Struct):
    """The sampling parameters of /generate."""

    n: int | None = None
    max_new_tokens: int | None = None
    stop_token_ids: Raw = NO_VALUE


class Generate(Body):
    """The body of /generate."""

    text: TextsOrIds | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    input_embeds: list[Raw] | None = None
    sampling_params: SamplingParams | list[SamplingParams] | None = None


class Completions(Body):
    """The body of /v1/completions."""

    prompt: TextsOrIds | None = None


class Chat(Body):
    """The body of /v1/chat/completions."""

    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    input_ids: list[TokenId] | None = None
    """An extension of SGLang: the prompt in place of what the chat template would make of the messages."""
    tools: Raw = NO_VALUE


class ChatUnknown(Chat):
    """The body of /v1/chat/completions with messages of any form."""

    messages: list[Unknown] | None = None  # type: ignore[assignment]


class Messages(Body):
    """The body of /v1/messages."""

    system: str | list[Part] | None = None
    messages: list[Message] | None = None
    tools: Raw = NO_VALUE


class MessagesUnknown(Messages):
    """The body of /v1/messages with messages of any form."""

    messages: list[Unknown] | None = None  # type: ignore[assignment]


class Responses(Body):
    """The body of /v1/responses."""

    input: str | list[Message] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: Raw = NO_VALUE


class ResponsesUnknown(Responses):
    """The body of /v1/responses with input items of any form."""

    input: str | list[Unknown] | None = None  # type: ignore[assignment]


SHAPES: Final[dict[Api, tuple[type[Body], ...]]] = {
    Api.GENERATE: (Generate,),
    Api.COMPLETIONS: (Completions,),
    Api.CHAT: (Chat, ChatUnknown),
    Api.RESPONSES: (Responses, ResponsesUnknown),
    Api.MESSAGES: (Messages, MessagesUnknown),
}
"""The shapes of each API, in the order in which they are tried."""
