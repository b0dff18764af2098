"""Send requests as clients do, and read the responses."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import httpx

APIS: Final = {
    "/generate": lambda prompt, tokens: {
        "text": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    },
    "/v1/completions": lambda prompt, tokens: {
        "model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": True,
    },
    "/v1/chat/completions": lambda prompt, tokens: {
        "model": "tiny", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": tokens,
        "ignore_eos": True,
    },
}  # fmt: skip
"""Bodies by path, for a greedy response of exactly so many tokens."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request to which a unified engine has answered."""

    path: str
    prompt: str
    stream: bool
    tokens: int = 6

    def body(self, **more: Any) -> dict[str, Any]:
        return {**APIS[self.path](self.prompt, self.tokens), "stream": self.stream, **more}


@dataclass(frozen=True, slots=True)
class Received:
    """The response that a client got."""

    status: int
    text: str
    """Text of the response; of an error its whole body."""
    rank: int | None = None
    """The rank that /generate reports."""
    complete: bool = True
    """Whether a stream ended correctly."""


def ask(client: httpx.Client, url: str, question: Question, **more: Any) -> Received:
    """Send a request, and read its response to the end."""
    if not question.stream:
        response = client.post(url + question.path, json=question.body(**more))
        if response.status_code != httpx.codes.OK:
            return Received(response.status_code, response.text)
        return _read(question.path, [response.json()])
    with client.stream("POST", url + question.path, json=question.body(**more)) as response:
        if response.status_code != httpx.codes.OK:
            return Received(response.status_code, response.read().decode())
        return _read(question.path, list(events(response)), streamed=True)


def ask_meta(client: httpx.Client, url: str, question: Question) -> dict[str, Any]:
    """Request log probabilities from /generate, and return the last ``meta_info``."""
    asked = question.body(return_logprob=True, logprob_start_len=0, top_logprobs_num=2, token_ids_logprob=[10, 20])
    response = client.post(url + question.path, json=asked).raise_for_status()
    lines = response.text.split("\n\n") if question.stream else [response.text]
    *_, last = [line.removeprefix("data: ") for line in lines if line and "[DONE]" not in line]
    meta: dict[str, Any] = json.loads(last)["meta_info"]
    return meta


def ask_echo(
    client: httpx.Client, url: str, prompt: Any, *, stream: bool, tokens: int = 1
) -> dict[int, dict[str, Any]]:
    """Request log probabilities of an echoed prompt, as lm-eval-harness does, and return those of each choice."""
    asked = {
        "model": "tiny", "prompt": prompt, "stream": stream, "echo": True, "logprobs": 1, "temperature": 0,
        "max_tokens": tokens, "ignore_eos": True,
    }  # fmt: skip
    response = client.post(f"{url}/v1/completions", json=asked)
    if response.status_code != httpx.codes.OK:
        return {0: {"error": f"{response.status_code}: {response.text[:100]}"}}
    lines = response.text.split("\n\n") if stream else [response.text]
    found: dict[int, dict[str, Any]] = {}
    for line in (line.removeprefix("data: ") for line in lines if line and "[DONE]" not in line):
        for choice in json.loads(line).get("choices", []):
            known = found.setdefault(choice["index"], {})
            for key, entries in (choice.get("logprobs") or {}).items():
                known[key] = known.get(key, []) + entries
    return found


def events(response: httpx.Response) -> Iterator[dict[str, Any] | None]:
    """Read a stream's events; None is its proper end."""
    for line in response.iter_lines():
        if line.startswith("data:"):
            data = line[5:].strip()
            yield None if data == "[DONE]" else json.loads(data)


def _read(path: str, found: list[dict[str, Any] | None], *, streamed: bool = False) -> Received:
    complete = not streamed or (bool(found) and found[-1] is None)
    known = [event for event in found if event is not None]
    if path == "/generate":  # each event has the whole text so far
        return Received(200, known[-1]["text"], known[-1]["meta_info"].get("dp_rank"), complete)
    key = "delta" if streamed else "message"
    choices = [choice for event in known for choice in event.get("choices", [])]
    texts = [choice["text"] if "text" in choice else choice[key].get("content") or "" for choice in choices]
    return Received(200, "".join(texts), None, complete)
