"""Run a prefill and a decode engine, and send both legs of requests to them."""

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess

RANKS = 4
FAST = ("--time-scale", "0.01", "--timeout-bootstrap", "80", "--timeout-waiting", "80")
"""A hundred times faster, and a leg without its other leg gives up after 0.8 seconds."""
PROMPTS: dict[str, dict[str, Any]] = {
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 3}},
    "/v1/completions": {"prompt": "hello", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    "/v1/responses": {"input": "hello", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
}


@dataclass(slots=True)
class Pair:
    """Two engines that can connect."""

    prefill: EngineProcess
    decode: EngineProcess
    client: httpx.Client
    pool: ThreadPoolExecutor
    _rooms: Iterator[int] = field(default_factory=lambda: itertools.count(1000))

    def room(self, rank: int = 0) -> int:
        """Return a fresh room that belongs to a prefill rank."""
        return next(self._rooms) * RANKS + rank

    def meeting(self, room: object, **more: Any) -> dict[str, Any]:
        """Return the bootstrap fields of both legs."""
        place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.prefill.bootstrap_port}
        return {**place, "bootstrap_room": room, **more}

    def post(self, engine: EngineProcess, path: str, **body: Any) -> Future[httpx.Response]:
        """Send a leg and do not wait for the answer."""
        return self.pool.submit(self.client.post, engine.url + path, json={**PROMPTS[path], **body})

    def send(
        self,
        path: str,
        common: dict[str, Any],
        prefill: dict[str, Any] | None = None,
        decode: dict[str, Any] | None = None,
    ) -> tuple[httpx.Response, httpx.Response]:
        """Send both legs and wait for both answers, prefill's first."""
        legs = (
            self.post(self.prefill, path, **common, **(prefill or {})),
            self.post(self.decode, path, **common, **(decode or {})),
        )
        return legs[0].result(), legs[1].result()

    def legs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the last leg that each engine has received."""
        return self.prefill.requests()[-1], self.decode.requests()[-1]


@contextmanager
def run_pair(
    version: str, *options: str, dp_attention: bool = True, ranks: int = RANKS, host: str = "127.0.0.1"
) -> Iterator[Pair]:
    """Run a pair of one release."""
    common = ["--sglang-version", version, *FAST, *(["--dp-attention"] if dp_attention else []), *options]
    prefill, decode = (
        EngineProcess(role, size, *common, host=host) for role, size in (("prefill", ranks), ("decode", 2))
    )
    try:
        prefill.start()
        decode.start()
        prefill.wait_until_listening()
        decode.wait_until_listening()
        with loopback.client() as client, ThreadPoolExecutor(16) as pool:
            yield Pair(prefill, decode, client, pool)
    finally:
        prefill.__exit__(None, None, None)
        decode.__exit__(None, None, None)


def text_of(response: httpx.Response) -> str:
    """Return the error message of an answer in any of SGLang's shapes."""
    body = response.json()
    error = body.get("error", body)
    return str(error if isinstance(error, str) else error["message"])
