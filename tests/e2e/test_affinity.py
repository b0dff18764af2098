"""Requests reach the rank whose prefix cache holds the beginning of their prompt."""

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from e2e.stack import Stack, run_stack

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they")
OUTPUT = {"sampling_params": {"max_new_tokens": 1}}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Stack]:
    """Give two prefill engines of four ranks; clients name their conversation in a header."""
    with run_stack(prefills=2, envoy={"session_header": "X-Conversation"}) as stack:
        yield stack


def text(seed: int, words: int) -> str:
    rng = Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def send(stack: Stack, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = stack.client.post("/generate", json=body | OUTPUT, headers=headers)
    assert answer.status_code == 200, answer.text
    meta: dict[str, Any] = answer.json()["meta_info"]
    return meta


def prefill_ranks(stack: Stack) -> Counter[tuple[str, int]]:
    """Count the prompts of each rank since the journals were cleared."""
    return Counter(
        (engine.url, leg["dp_rank"])
        for engine in stack.prefills
        for request in engine.requests()
        for leg in request["legs"]
    )


def test_a_prompt_returns_to_its_rank_when_it_repeats(fleet: Stack) -> None:
    """Of 24 equal prompts in a row all go to one rank of eight, whose engine has all but the first in its cache."""
    fleet.forget()
    prompt = {"text": text(1, 2000)}
    cached = [send(fleet, prompt)["cached_tokens"] for _ in range(24)]

    assert list(prefill_ranks(fleet).values()) == [24]
    assert cached[0] == 0
    assert min(cached[1:]) > 1500


def test_a_conversation_returns_to_its_rank_while_it_grows(fleet: Stack) -> None:
    """Each of eight growing conversations stays on one rank, and they share the ranks evenly."""
    fleet.forget()
    turns = {number: text(100 + number, 800) for number in range(8)}
    ranks: dict[int, set[tuple[str, int]]] = {number: set() for number in turns}
    for turn in range(4):
        for number, prompt in turns.items():
            before = prefill_ranks(fleet)
            send(fleet, {"text": prompt})
            ranks[number] |= set(prefill_ranks(fleet) - before)
            turns[number] = prompt + " " + text(1000 * turn + number, 300)

    assert all(len(used) == 1 for used in ranks.values())


def test_a_session_header_selects_the_rank_without_a_shared_prefix(fleet: Stack) -> None:
    """Token ids without a shared prefix go to the rank of their conversation."""
    fleet.forget()
    rng = Random(5)
    for _ in range(6):
        send(fleet, {"input_ids": [rng.randrange(30_000) for _ in range(3000)]}, **{"x-conversation": "alice"})

    assert list(prefill_ranks(fleet).values()) == [6]


def test_an_internal_session_header_is_removed_from_client_requests(fleet: Stack) -> None:
    """Envoy copies only the configured header, so requests without a common prefix spread."""
    fleet.forget()
    rng = Random(6)
    for _ in range(16):
        send(fleet, {"input_ids": [rng.randrange(30_000) for _ in range(3000)]}, **{"x-dp-session": "alice"})

    assert len(prefill_ranks(fleet)) > 1
    assert all("x-dp-session" not in dict(request["headers"]) for request in fleet.received())


def test_cached_tokens_are_counted_in_metrics_and_loads(fleet: Stack) -> None:
    """The metrics and ``/loads`` show the number of prompt tokens that probably were in the prefix caches."""
    send(fleet, {"text": text(7, 2000)})
    send(fleet, {"text": text(7, 2000)})

    assert sum(endpoint["cached_tokens"] for endpoint in fleet.service.loads()["endpoints"]) > 1500
