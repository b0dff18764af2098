"""The bodies of the five APIs, as far as they matter here. Whatever else a body holds is skipped unread.

Every field that is read may be null: client libraries send nulls for what was not set.
"""

from typing import Annotated, Any, Final

from msgspec import Meta, Raw, Struct

from dp_extproc.request.path import Api

NO_VALUE: Final = Raw(b"")


class Part(Struct):
    """A piece of a message's content, of any API."""

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
"""A message whose content has a form that is not known here; the engine is to judge it."""

LARGEST_ID: Final = 2**31 - 1
"""No vocabulary is so large."""

TokenId = Annotated[int, Meta(ge=0, le=LARGEST_ID)]
"""Looks up a row of the embedding. No release of SGLang looks whether there is one: its process ends if not."""

TextsOrIds = str | list[str | TokenId | list[TokenId]]


class Body(Struct):
    """What all APIs have in common."""

    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    priority: int | None = None


class SamplingParams(Struct):
    """Of /generate."""

    n: int | None = None
    max_new_tokens: int | None = None
    stop_token_ids: Raw = NO_VALUE


class Generate(Body):
    """/generate."""

    text: TextsOrIds | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    input_embeds: list[Raw] | None = None
    sampling_params: SamplingParams | list[SamplingParams] | None = None


class Completions(Body):
    """/v1/completions."""

    prompt: TextsOrIds | None = None


class Chat(Body):
    """/v1/chat/completions."""

    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    input_ids: list[TokenId] | None = None
    """SGLang's own: takes the place of what the chat template would make of the messages."""
    tools: Raw = NO_VALUE


class ChatUnknown(Chat):
    """The same with messages of any form."""

    messages: list[Unknown] | None = None  # type: ignore[assignment]


class Messages(Body):
    """/v1/messages."""

    system: str | list[Part] | None = None
    messages: list[Message] | None = None
    tools: Raw = NO_VALUE


class MessagesUnknown(Messages):
    """The same with messages of any form."""

    messages: list[Unknown] | None = None  # type: ignore[assignment]


class Responses(Body):
    """/v1/responses."""

    input: str | list[Message] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: Raw = NO_VALUE


class ResponsesUnknown(Responses):
    """The same with input items of any form."""

    input: str | list[Unknown] | None = None  # type: ignore[assignment]


SHAPES: Final[dict[Api, tuple[type[Body], ...]]] = {
    Api.GENERATE: (Generate,),
    Api.COMPLETIONS: (Completions,),
    Api.CHAT: (Chat, ChatUnknown),
    Api.RESPONSES: (Responses, ResponsesUnknown),
    Api.MESSAGES: (Messages, MessagesUnknown),
}
"""To be tried in this order."""
