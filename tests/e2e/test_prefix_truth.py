"""The prefix index is held against the cached tokens that engines count, through real Envoy."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dp_extproc.lab.testbed import loopback
from e2e.stack import Stack, run_stack
from patience import wait_for

PROMPTS = [f"{number:07} " * 5000 for number in range(5)]
"""Prompts of 40 kB, about 10,000 tokens each."""


def send_all(stack: Stack) -> None:
    def generate(text: str) -> int:
        return stack.client.post("/generate", json={"text": text, "sampling_params": {"max_new_tokens": 1}}).status_code

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        assert set(threads.map(generate, PROMPTS)) == {200}


def prefix_cache(stack: Stack) -> dict[str, Any]:
    shown = next(each for each in stack.service.loads()["endpoints"] if each["role"] == "prefill")
    found: dict[str, Any] = shown["prefix_cache"]
    return found


def read_twice(stack: Stack) -> None:
    """Wait until the pages of prefill were read twice from now on."""
    pattern = rf'dp_extproc_load_updates_total{{endpoint="{re.escape(stack.prefills[0].url)}",[^}}]*}} ([\d.]+)'

    def reads() -> float:
        return float(re.findall(pattern, stack.service.metrics())[0])

    before = reads()
    wait_for(lambda: reads() >= before + 2)


def test_flushed_cache_is_noticed_by_what_the_engine_counts() -> None:
    """The engine finds what was expected; after a flush nothing, so the expectation counts in part until it is true."""
    with run_stack(load={"source": "metrics", "interval": "300ms"}) as stack:
        send_all(stack)
        read_twice(stack)  # an engine has no counts before its first prompt
        send_all(stack)
        before = wait_for(lambda: (now := prefix_cache(stack))["expected_tokens"] > 25_000 and now)
        flushed = loopback.CLIENT.post(f"{stack.prefills[0].url}/flush_cache")
        send_all(stack)
        after = wait_for(lambda: (now := prefix_cache(stack))["credited_share"] < 0.85 and now)
        metrics = stack.service.metrics()

    assert flushed.status_code == 200
    assert before["found_tokens"] > 0.8 * before["expected_tokens"]
    assert before["credited_share"] == 1.0
    assert after["found_tokens"] < 1.1 * before["found_tokens"]
    assert after["expected_tokens"] > before["expected_tokens"] + 10_000
    assert "dp_extproc_found_cached_tokens_total{" in metrics
    assert "dp_extproc_prefix_credit_ratio{" in metrics
