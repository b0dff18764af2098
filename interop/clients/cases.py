"""The clients, and the mistakes and errors that they run into."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

CHAT: Final = "chat"
COMPLETIONS: Final = "completions"
RESPONSES: Final = "responses"
MESSAGES: Final = "messages"
_LIMIT: Final[Mapping[str, str]] = {RESPONSES: "max_output_tokens"}
"""The field that limits the answer, where it is not ``max_tokens``."""
_PROMPT: Final[Mapping[str, str]] = {RESPONSES: "input", COMPLETIONS: "prompt"}
"""The field of the prompt, where it is not ``messages``."""


@dataclass(frozen=True, slots=True)
class Client:
    """A client library, on one API."""

    language: str
    name: str
    package: str
    api: str
    takes_any_body: bool = True
    """Whether it sends fields and values that its own types do not allow."""
    tries_again: bool = True
    """Whether it tries again by default."""


CLIENTS: Final = (
    Client("Python", "openai_chat", "openai", CHAT),
    Client("Python", "openai_completions", "openai", COMPLETIONS),
    Client("Python", "openai_responses", "openai", RESPONSES),
    Client("Python", "anthropic_messages", "anthropic", MESSAGES),
    Client("Python", "langchain_openai", "langchain-openai", CHAT),
    Client("Python", "langchain_anthropic", "langchain-anthropic", MESSAGES),
    Client("Python", "litellm_openai", "litellm", CHAT),
    Client("Python", "litellm_anthropic", "litellm", MESSAGES, takes_any_body=False, tries_again=False),
    Client("Python", "llama_index", "llama-index-llms-openai-like", CHAT),
    Client("Node", "openai_chat", "openai", CHAT),
    Client("Node", "openai_completions", "openai", COMPLETIONS),
    Client("Node", "openai_responses", "openai", RESPONSES),
    Client("Node", "anthropic_messages", "@anthropic-ai/sdk", MESSAGES),
    Client("Node", "ai_sdk_openai_chat", "@ai-sdk/openai", CHAT),
    Client("Node", "ai_sdk_openai_responses", "@ai-sdk/openai", RESPONSES),
    Client("Node", "ai_sdk_anthropic", "@ai-sdk/anthropic", MESSAGES),
    Client("Node", "langchain_openai", "@langchain/openai", CHAT, takes_any_body=False),
    Client("Node", "langchain_anthropic", "@langchain/anthropic", MESSAGES),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A mistake of a user, or an error of the fleet."""

    name: str
    shows: str
    """Words that the client has to show; ``{limit}`` and ``{prompt}`` are the fields of its API."""
    model: str = "m"
    path: str = ""
    """What the base URL has too much."""
    prompt: str = "hello"
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the body that the client would not send by itself; ``{limit}`` and ``{prompt}`` as above."""
    apis: tuple[str, ...] = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
    streams: tuple[bool, ...] = (False, True)
    fault: Any = "ok"
    """What the engines do."""
    decode_only: bool = False
    is_full: bool = False
    """Whether the fleet has no room."""
    recovers: bool = False
    """Whether the default retries of the client have to lead to an answer."""
    refused_with: int = 0
    """The status that a client that recovers gets first."""

    def concerns(self, client: Client) -> bool:
        """Return whether the client can make this mistake."""
        can_send = client.takes_any_body or not self.fields
        return client.api in self.apis and can_send and (client.tries_again or not self.recovers)

    def words(self, client: Client) -> str:
        """Return the words that a client has to show."""
        return _fill(self.shows, client.api)

    def request(self, client: Client, url: str, *, stream: bool) -> dict[str, Any]:
        """Write the case for the process that has the clients."""
        return {
            "client": client.name,
            "base": url + self.path,
            "model": self.model,
            "prompt": self.prompt,
            "extra": {_fill(name, client.api): value for name, value in self.fields.items()},
            "stream": stream,
            "retries": self.recovers,
        }


def _fill(text: str, api: str) -> str:
    limit, prompt = _LIMIT.get(api, "max_tokens"), _PROMPT.get(api, "messages")
    return text.replace("{limit}", limit).replace("{prompt}", prompt)


_ONCE: Final = {"kind": "503", "times": 1}
_CUT: Final = {"kind": "close", "after": 4, "seconds": 0.2}

CASES: Final = (
    Case("unknown model", "does not exist", model="gpt-9"),
    Case("wrong base URL", "unknown path", path="/v2"),
    Case("wrong type", "{limit}", fields={"{limit}": "many"}),
    Case("no prompt", "{prompt} is needed", fields={"{prompt}": None}),
    Case("prompt too long", "tokens", prompt="word " * 180_000),
    Case("body too large", "larger than", prompt="word " * 450_000),
    Case("n of 2", "n=2 does not work", fields={"n": 2}, apis=(CHAT, COMPLETIONS)),
    Case("token ids", "token ids are", fields={"prompt": [[-1, 5]]}, apis=(COMPLETIONS,)),
    Case("engines down", "did not answer", fault="refuse"),
    Case("engine error", "a fault is switched on", fault="400"),
    Case("fleet full", "try again", is_full=True),
    Case("cut stream", "the answer is not complete", streams=(True,), fault=_CUT, decode_only=True),
    Case("recovers from 503", "", fault=_ONCE, decode_only=True, recovers=True, refused_with=503),
    Case("recovers from 429", "", is_full=True, recovers=True, refused_with=429),
)
