"""What is tried on a disaggregated pair of real servers behind Envoy and the service."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isclose
from typing import Any, Final, TypeVar

import httpx

from interop.asking import APIS, Heard, Question, ask, ask_meta, events
from interop.report import Report
from interop.servers import CONTEXT_TOKENS, RealServer

T = TypeVar("T")

RANKS: Final = (0, 1)
PATIENCE_SECONDS: Final = 60.0
"""A leg that waits for its peer would stay 300 s: whatever ends earlier was ended by somebody."""
LONG: Final = 1900
"""Tokens: some 20 s on these servers, much longer than any of them takes to notice that its client has left."""

PAIRS: Final = tuple(itertools.product(RANKS, RANKS))
QUESTIONS: Final = {
    (path, stream, pair): Question(path, f"{number}. Tell me what {path} is, please.", stream)
    for number, (path, stream, pair) in enumerate(itertools.product(APIS, (False, True), PAIRS), start=10)
}
"""No two prompts begin alike, so no prefix cache hides which rank has computed one."""

LOGPROBS_QUESTIONS: Final = {
    stream: Question("/generate", f"{stream}, the prompt is told, too.", stream) for stream in (False, True)
}
LOGPROB_KEYS: Final = ("input_token_logprobs", "input_token_ids_logprobs")
"""Not the likeliest tokens: of random weights many are equally likely, and rounding orders them."""

Answers = Mapping[tuple[str, bool, tuple[int, int]], Heard]


@dataclass(frozen=True, slots=True)
class Rig:
    """Everything that runs."""

    client: httpx.Client
    url: str
    prefill: RealServer
    decode: RealServer
    answers: Answers
    """Of the unified server."""
    logprobs: Mapping[bool, dict[str, Any]]
    """Likewise: ``meta_info`` of what was asked for log probabilities, whole and streamed."""
    report: Report


def every_pair(rig: Rig) -> None:
    """Each API reaches each pair of ranks that the client chooses, and answers as one server would."""
    for (path, stream), keys in itertools.groupby(QUESTIONS, lambda key: key[:2]):
        reached, same, wrong = 0, 0, ""
        for key in keys:
            (prefill_rank, decode_rank), before = key[2], _computed(rig)
            heard = ask(
                rig.client, rig.url, QUESTIONS[key], routed_dp_rank=decode_rank, disagg_prefill_dp_rank=prefill_rank
            )
            seen = _moved(rig, before)
            told = heard.rank in {None, decode_rank}
            if seen == (prefill_rank, decode_rank) and told:
                reached += 1
            else:
                wrong += f"; P{prefill_rank} D{decode_rank}: {heard.status}, counters {seen}, told {heard.rank}"
            expected = rig.answers[key].text
            if heard.complete and heard.text == expected:
                same += 1
            else:
                wrong += f"; {heard.text!r} instead of {expected!r}"
        seen_all = f"{reached} of 4 pairs reached, {same} of 4 answers equal the unified server's{wrong}"
        rig.report.add(f"{path}, {'streamed' if stream else 'whole'}", seen_all, good=reached == same == len(PAIRS))


def chosen_by_us(rig: Rig) -> None:
    """Without a wish of the client's, both ranks of both servers get work."""
    pairs = []
    for number in range(8):
        before = _computed(rig)
        heard = ask(rig.client, rig.url, Question("/generate", f"{number + 100} is a number", stream=False))
        if heard.status == httpx.codes.OK:
            pairs.append(_moved(rig, before))
    used = [{pair[side] for pair in pairs} for side in (0, 1)]
    seen = f"{len(pairs)} of 8 answered, prefill ranks {sorted(used[0])}, decode ranks {sorted(used[1])}"
    rig.report.add("8 requests, ranks chosen by the service", seen, good=len(pairs) == 8 and used == [{0, 1}, {0, 1}])


def log_probabilities(rig: Rig) -> None:
    """Those of the prompt, which only prefill knows, are told as by one server, up to the last digits."""
    for stream in (False, True):
        question = LOGPROBS_QUESTIONS[stream]
        before = _computed(rig)
        expected = rig.logprobs[stream]
        heard = ask_meta(rig.client, rig.url, question)
        _moved(rig, before)
        lengths = {key: len(heard.get(key) or []) for key in LOGPROB_KEYS}
        same = sum(_near(heard.get(key), expected[key]) for key in LOGPROB_KEYS)
        seen = f"{same} of {len(LOGPROB_KEYS)} lists equal the unified server's; lengths {list(lengths.values())}"
        good = same == len(LOGPROB_KEYS) and set(lengths.values()) == {len(question.prompt)}
        rig.report.add(f"log probabilities, {'streamed' if stream else 'whole'}", seen, good=good)


def too_long(rig: Rig) -> None:
    """What is the client's own fault comes as the engine said it."""
    heard = ask(rig.client, rig.url, Question("/generate", "x" * (CONTEXT_TOKENS + 100), stream=False))
    rig.report.add("prompt longer than the context", f"{heard.status}: {heard.text[:120]}", good=heard.status == 400)


def client_leaves(rig: Rig) -> None:
    """The decode server gives a request up whose client has left, streaming or not."""
    for stream in (True, False):
        before = sum(rig.decode.computed())
        question = Question("/generate", f"abort {stream}", stream, LONG)
        if stream:
            with rig.client.stream("POST", rig.url + question.path, json=question.body()) as response:
                next(events(response))
        else:
            with suppress(httpx.ReadTimeout):
                rig.client.post(rig.url + question.path, json=question.body(), timeout=2)
        left = time.monotonic()
        freed = _wait(lambda: all(not each["num_running_reqs"] for each in rig.decode.loads()))
        took, computed = time.monotonic() - left, sum(rig.decode.computed()) - before
        free = _wait(
            lambda: all(not each["num_used_tokens"] for server in (rig.prefill, rig.decode) for each in server.loads())
        )
        seen = f"freed after {took:.1f} s and {computed} of {LONG} tokens" if freed else "not freed"
        good = bool(freed) and bool(free) and computed < LONG
        rig.report.add(f"the client leaves, {'streamed' if stream else 'whole'}", seen, good=good)


def prefill_dies(rig: Rig) -> None:
    """A stream that has its KV cache goes on; new requests fail at once; all is well again when the server is back."""
    question = Question("/generate", "prefill dies", stream=True, tokens=300)
    with rig.client.stream("POST", rig.url + question.path, json=question.body()) as response:
        stream = events(response)
        next(stream)
        rig.prefill.kill()
        last = list(stream)[-2:]
    whole = len(last) == 2 and last[0] is not None and last[1] is None
    tokens = last[0]["meta_info"]["completion_tokens"] if whole and last[0] else 0
    rig.report.add("SIGKILL to prefill: a stream in flight", f"{tokens} of 300 tokens", good=tokens == 300)

    for case in ("at once", "later"):
        began = time.monotonic()
        heard = ask(rig.client, rig.url, Question("/v1/chat/completions", f"nobody there, {case}", stream=False))
        took = time.monotonic() - began
        seen = f"{heard.status} after {took:.1f} s: {heard.text[:100]}"
        rig.report.add(f"prefill is gone: a new request, {case}", seen, good=heard.status in {502, 503})
    freed = _wait(lambda: all(not each["num_used_tokens"] for each in rig.decode.loads()))
    rig.report.add("prefill is gone: KV cache on decode", "free" if freed else "still reserved", good=bool(freed))

    rig.decode.step_back()
    rig.prefill.start()
    rig.prefill.wait_until_ready()
    began = time.monotonic()
    back = _wait(
        lambda: ask(rig.client, rig.url, Question("/v1/completions", "back again", stream=False)).status == 200
    )
    seen = f"200 after {time.monotonic() - began:.1f} s" if back else "no answer"
    rig.report.add("prefill is back: a new request", seen, good=bool(back))


def decode_dies(rig: Rig) -> None:
    """A stream that has begun ends at once, with an error event. The last case: nobody starts that server again."""
    question = Question("/v1/chat/completions", "decode dies", stream=True, tokens=300)
    with rig.client.stream("POST", rig.url + question.path, json=question.body()) as response:
        stream = events(response)
        next(stream)
        rig.decode.kill()
        killed = time.monotonic()
        last = list(stream)[-1]
    took = time.monotonic() - killed
    code = (last or {}).get("error", {}).get("code")
    rig.report.add("SIGKILL to decode: a stream in flight", f"{code} after {took:.1f} s", good=code == "stream_cut")


CASES: Final[Sequence[Callable[[Rig], None]]] = (
    every_pair, chosen_by_us, log_probabilities, too_long, client_leaves, prefill_dies, decode_dies,
)  # fmt: skip


def unified_answers(client: httpx.Client, unified: RealServer) -> Answers:
    """Ask a unified server everything that is compared with it."""
    return {key: ask(client, unified.url, question) for key, question in QUESTIONS.items()}


def unified_logprobs(client: httpx.Client, unified: RealServer) -> dict[bool, dict[str, Any]]:
    """Ask a unified server for log probabilities."""
    return {stream: ask_meta(client, unified.url, question) for stream, question in LOGPROBS_QUESTIONS.items()}


def _near(ours: Any, theirs: Any) -> bool:
    """Whether two JSON values are the same but for rounding."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_near, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return isclose(ours, theirs, abs_tol=1e-4)
    return bool(ours == theirs)


def _computed(rig: Rig) -> tuple[list[int], list[int]]:
    return rig.prefill.computed(), rig.decode.computed()


def _moved(rig: Rig, before: tuple[list[int], list[int]]) -> tuple[int, int]:
    """Wait until the counters of one rank of each server have moved, and tell which; -1 for none or several."""

    def moved() -> list[list[int]] | None:
        sides = [
            [rank for rank in RANKS if now[rank] > old[rank]] for now, old in zip(_computed(rig), before, strict=True)
        ]
        return sides if all(sides) else None

    sides = _wait(moved, 10) or [[], []]
    prefill, decode = (side[0] if len(side) == 1 else -1 for side in sides)
    return prefill, decode


def _wait(probe: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T | None:
    """Wait until a probe gives something that is true, but not for ever."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(0.1)
    return None
