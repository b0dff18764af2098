"""Two servers of each role, the service and Envoy, with times so short that what takes too long does so quickly."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx

from dp_extproc.testbed.engine import EngineProcess
from e2e.stack import Stack, run_stack, wait_for

TOKENS: Final = 5
"""That each request asks for."""
PATIENCE: Final = 2.0
"""Seconds that a client waits for the next byte."""
QUICK: Final[dict[str, Any]] = {
    "load": {"interval": "100ms", "stale_after": "2s", "timeout": "1s"},
    "supervision": {"mode": "answers", "prefill_timeout": "300ms", "first_token_timeout": "300ms"},
    "retry": {"attempts": 3, "budget": 1.0},
    # Here every cell is to be about retries alone; who is left alone for how long has tests of its own.
    "health": {"failures": 1000},
}

BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": TOKENS},
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": TOKENS}},
}


@dataclass(frozen=True)
class Outcome:
    """What a client got."""

    status: int | None
    """None if there was no answer as long as it waited."""
    text: str
    complete: bool
    """Whether the answer came to its end, with every token."""
    reason: str | None
    """By which the service says that the answer is its own."""

    def __str__(self) -> str:
        if self.status is None:
            return "waits"
        if self.status == 200:
            return "answer" if self.complete else "part of the answer"
        return f"{self.status} {self.reason}" if self.reason else f"{self.status} of the engine"


def ask(client: httpx.Client, path: str, *, stream: bool, patience: float = PATIENCE) -> Outcome:
    """Send a request, and tell what came of it."""
    text, status, reason = b"", None, None
    try:
        with client.stream("POST", path, json={**BODIES[path], "stream": stream}, timeout=patience) as answer:
            status, reason = answer.status_code, answer.headers.get("x-dp-extproc-reason")
            for chunk in answer.iter_bytes():
                text += chunk
    except httpx.TimeoutException:
        return Outcome(None if not text else status, text.decode(), complete=False, reason=reason)
    except httpx.TransportError:
        return Outcome(status or 0, text.decode(errors="replace"), complete=False, reason=reason)
    return Outcome(status, text.decode(), complete=status == 200 and _is_complete(text, stream=stream), reason=reason)


def _is_complete(text: bytes, *, stream: bool) -> bool:
    if stream:
        return text.endswith(b"data: [DONE]\n\n") and b'"length"' in text
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    usage = answer.get("usage") or answer.get("meta_info") or {}
    return bool(usage.get("completion_tokens") == TOKENS)


@dataclass(frozen=True)
class Fleet:
    """What the cells of the matrix share."""

    stack: Stack
    clients: ThreadPoolExecutor

    @property
    def engines(self) -> Sequence[EngineProcess]:
        return (*self.stack.prefills, *self.stack.decodes)

    def ask_twice(self, path: str, *, stream: bool) -> list[Outcome]:
        """Send two requests at once, which go to different servers."""
        both = [self.clients.submit(ask, self.stack.client, path, stream=stream) for _ in range(2)]
        return [each.result() for each in both]

    def recover(self) -> None:
        """Put everything right, and wait until the service knows."""
        for engine in self.engines:
            engine.heal()
        wait_for(lambda: all(each["state"] == "fresh" and not each["failure"] for each in self._endpoints()))

    def settle(self) -> float:
        """Wait until no engine has anything to do, and nothing is on the books.

        Returns:
            Seconds that it took.
        """
        began = time.monotonic()
        wait_for(lambda: not self._running(), 5)
        wait_for(lambda: not self._reserved(), 5)
        return time.monotonic() - began

    def _running(self) -> list[tuple[str, str]]:
        return [
            (engine.role, record["path"])
            for engine in self.engines
            for record in engine.requests()
            if record["outcome"] == "running"
        ]

    def _reserved(self) -> list[dict[str, Any]]:
        reserved = [rank["reserved"] for each in self._endpoints() for rank in each["ranks"]]
        return [each for each in reserved if each["requests"] or each["tokens"]]

    def _endpoints(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.stack.service.loads()["endpoints"]
        return found


@contextmanager
def run_fleet(**sections: Any) -> Iterator[Fleet]:
    """Run it."""
    with run_stack(prefills=2, decodes=2, **{**QUICK, **sections}) as stack, ThreadPoolExecutor(64) as clients:
        yield Fleet(stack, clients)
