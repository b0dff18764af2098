"""Requests that a real SGLang 0.5.23 was sent, and what it answered: ours answers the same.

The server was ``--dp-size 2`` with a model of two layers whose tokens are bytes, and no header overrides.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dp_extproc.testbed.engine import EngineProcess
from engine.pair import FAST

RECORDED = json.loads((Path(__file__).parent / "recorded" / "unified.json").read_text())
SHAPES: dict[str, Any] = RECORDED["shapes"]
CASES: list[dict[str, Any]] = RECORDED["cases"]

OTHER_WORDS = {"generate bad json", "/v1/chat/completions bad json", "/v1/completions bad json"}
"""The JSON library words its own errors: orjson there, msgspec here."""
NOT_TOLD = {
    "storage_prefetch_wait", "storage_staging_wait", "forward_entry_time", "prefill_finished_time", "queue_time",
    "api_server_dispatch_finish_ts", "decode_throughput", "response_sent_to_client_ts",
    "reasoning", "phase", "cache_write_tokens",
}  # fmt: skip
"""Times that nobody reads, and members of /v1/responses that are always null or 0."""


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    """A server as the recorded one."""
    with EngineProcess("unified", 2, *FAST, "--model", "tiny") as engine:
        yield engine


def ask(engine: EngineProcess, case: dict[str, Any]) -> httpx.Response:
    headers = {"content-type": "application/json", **case.get("headers", {})}
    return httpx.post(f"{engine.url}{case['target']}", headers=headers, content=case["body"].encode())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_answer(engine: EngineProcess, case: dict[str, Any]) -> None:
    """The same status, the same kind of content, the same error; of an answer the same members, from the same rank."""
    response = ask(engine, case)

    assert response.status_code == case["status"], response.text
    assert response.headers["content-type"] == case.get("type", "application/json")
    if "error" in case:
        assert case["name"] in OTHER_WORDS or without_trace(response.text) == case["error"]
        return
    streamed = "type" in case
    answer = first_event(response.text) if streamed else response.json()
    if "first_event" in case:
        assert answer == case["first_event"]
        return
    kind = " stream" if streamed else " batch" if isinstance(answer, list) else ""
    assert differences(answer, SHAPES[case["target"] + kind]) == set()
    if "dp_rank" in case:
        assert answer["meta_info"]["dp_rank"] == case["dp_rank"]


def without_trace(text: str) -> str:
    """Leave out where in its code the server has noticed."""
    return re.sub(r'\\n\\n  (File|  POST).*?(?=",")', "", text)


def first_event(text: str) -> Any:
    return json.loads(text.splitlines()[0].removeprefix("data: "))


def differences(ours: Any, theirs: Any, path: str = "") -> set[str]:
    """Name the members that one has and the other has not, but for those that are not told here."""
    if isinstance(theirs, list) and isinstance(ours, list):
        return set().union(*(differences(each, theirs[0], f"{path}[]") for each in ours)) if theirs else set()
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return set()  # one of them is null now and then, as cached_tokens_details without a hit
    odd = {f"{path}.{key}" for key in (ours.keys() ^ theirs.keys()) - NOT_TOLD}
    return odd.union(*(differences(ours[key], theirs[key], f"{path}.{key}") for key in ours.keys() & theirs.keys()))
