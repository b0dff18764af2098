"""Cases for a disaggregated pair of real engines behind Envoy and the service."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isclose
from typing import Any, Final, TypeVar

import httpx

from interop.asking import APIS, Question, Received, ask, ask_echo, ask_meta, events
from interop.report import Report
from interop.servers import CONTEXT_TOKENS, RealEngine

T = TypeVar("T")

RANKS: Final = (0, 1)
PATIENCE_SECONDS: Final = 60.0
"""A leg that waits for its peer would stay 300 s, so whatever ends earlier was ended on purpose."""
LONG: Final = 1900
"""Tokens of a response of about 20 s on these engines, much longer than they take to notice a disconnect."""

PAIRS: Final = tuple(itertools.product(RANKS, RANKS))
QUESTIONS: Final = {
    (path, stream, pair): Question(path, f"{number}. Tell me what {path} is, please.", stream)
    for number, (path, stream, pair) in enumerate(itertools.product(APIS, (False, True), PAIRS), start=10)
}
"""Questions without a common beginning, so no prefix cache hides which rank has computed one."""

LOGPROBS_QUESTIONS: Final = {
    stream: Question("/generate", f"{stream}, the prompt is told, too.", stream) for stream in (False, True)
}
LOGPROB_KEYS: Final = ("input_token_logprobs", "input_token_ids_logprobs")
"""Keys to compare.

The likeliest tokens are omitted: random weights make many equally likely, and rounding orders them.
"""

ECHOED: Final[Mapping[str, Any]] = {
    "a text": "The prompt is echoed.",
    "token ids": [11, 12, 13, 14],
    "a batch": [[11, 12, 13, 14], [21, 22, 23]],
}
"""Prompts of /v1/completions whose log probabilities are compared."""
ECHO_KEYS: Final = ("tokens", "token_logprobs", "text_offset")

Echoes = Mapping[tuple[str, bool], Mapping[int, Mapping[str, Any]]]
Answers = Mapping[tuple[str, bool, tuple[int, int]], Received]


@dataclass(frozen=True, slots=True)
class Rig:
    """The running parts, and the answers of a unified engine."""

    client: httpx.Client
    url: str
    prefill: RealEngine
    decode: RealEngine
    answers: Answers
    """Answers of the unified engine."""
    logprobs: Mapping[bool, dict[str, Any]]
    """``meta_info`` of the unified engine for requests with log probabilities, whole and streamed."""
    echoes: Echoes
    """``logprobs`` of the unified engine for prompts that are echoed."""
    report: Report
    form: str
    """Who sends the prefill leg; see :data:`interop.forms.FORMS`."""


def every_pair(rig: Rig) -> None:
    """Check that each API reaches each pair of ranks that the client chooses, and answers like one engine."""
    for (path, stream), keys in itertools.groupby(QUESTIONS, lambda key: key[:2]):
        reached, same, wrong = 0, 0, ""
        for key in keys:
            (prefill_rank, decode_rank), before = key[2], _computed(rig)
            got = ask(
                rig.client, rig.url, QUESTIONS[key], routed_dp_rank=decode_rank, disagg_prefill_dp_rank=prefill_rank
            )
            seen = _moved(rig, before)
            agrees = got.rank in {None, decode_rank}
            if seen == (prefill_rank, decode_rank) and agrees:
                reached += 1
            else:
                wrong += f"; P{prefill_rank} D{decode_rank}: {got.status}, counters {seen}, reported {got.rank}"
            expected = rig.answers[key].text
            if got.complete and got.text == expected:
                same += 1
            else:
                wrong += f"; {got.text!r} instead of {expected!r}"
        seen_all = f"{reached} of 4 pairs reached, {same} of 4 answers equal the unified engine's{wrong}"
        rig.report.add(f"{path}, {'streamed' if stream else 'whole'}", seen_all, good=reached == same == len(PAIRS))


def picked_by_the_service(rig: Rig) -> None:
    """Check that both ranks of both engines get work if the client chooses none."""
    pairs = []
    for number in range(8):
        before = _computed(rig)
        got = ask(rig.client, rig.url, Question("/generate", f"{number + 100} is a number", stream=False))
        if got.status == httpx.codes.OK:
            pairs.append(_moved(rig, before))
    used = [{pair[side] for pair in pairs} for side in (0, 1)]
    seen = f"{len(pairs)} of 8 answered, prefill ranks {sorted(used[0])}, decode ranks {sorted(used[1])}"
    rig.report.add("8 requests, ranks picked by the service", seen, good=len(pairs) == 8 and used == [{0, 1}, {0, 1}])


def log_probabilities(rig: Rig) -> None:
    """Check that log probabilities of the prompt, which only prefill has, equal those of one engine up to rounding.

    Another gateway does not show the response to the service, so there the request is refused.
    """
    if rig.form == "picker":
        more = {"return_logprob": True, "logprob_start_len": 0}
        refused = ask(rig.client, rig.url, LOGPROBS_QUESTIONS[False], **more)
        seen = f"{refused.status}: {refused.text[:100]}"
        rig.report.add("log probabilities of the prompt", seen, good=refused.status == 400)
        return
    for stream in (False, True):
        question = LOGPROBS_QUESTIONS[stream]
        before = _computed(rig)
        expected = rig.logprobs[stream]
        got = ask_meta(rig.client, rig.url, question)
        _moved(rig, before)
        lengths = {key: len(got.get(key) or []) for key in LOGPROB_KEYS}
        same = sum(_near(got.get(key), expected[key]) for key in LOGPROB_KEYS)
        seen = f"{same} of {len(LOGPROB_KEYS)} lists equal the unified engine's; lengths {list(lengths.values())}"
        good = same == len(LOGPROB_KEYS) and set(lengths.values()) == {len(question.prompt)}
        rig.report.add(f"log probabilities, {'streamed' if stream else 'whole'}", seen, good=good)


def echoed_prompts(rig: Rig) -> None:
    """Check that ``echo`` with ``logprobs``, as evaluation programs send it, gives what one engine gives."""
    if rig.form == "picker":
        refused = ask_echo(rig.client, rig.url, ECHOED["a text"], stream=False)[0].get("error", "")
        rig.report.add("echo with log probabilities", refused, good=refused.startswith("400"))
        return
    for (name, stream), expected in rig.echoes.items():
        got = ask_echo(rig.client, rig.url, ECHOED[name], stream=stream)
        same = [
            key
            for key in ECHO_KEYS
            if all(_near(got.get(index, {}).get(key), expected[index][key]) for index in expected)
        ]
        lengths = [len(each.get("tokens", [])) for each in got.values()]
        seen = f"{len(same)} of {len(ECHO_KEYS)} lists equal the unified engine's; lengths {lengths}"
        case = f"echo with log probabilities, {name}, {'streamed' if stream else 'whole'}"
        rig.report.add(case, seen, good=len(same) == len(ECHO_KEYS) and got.keys() == expected.keys())


def too_long(rig: Rig) -> None:
    """Check that the client's own error arrives with the text of the engine."""
    got = ask(rig.client, rig.url, Question("/generate", "x" * (CONTEXT_TOKENS + 100), stream=False))
    rig.report.add("prompt longer than the context", f"{got.status}: {got.text[:120]}", good=got.status == 400)


def client_disconnects(rig: Rig) -> None:
    """Check that the decode engine ends a request whose client has disconnected, streaming or not."""
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
            lambda: all(not each["num_used_tokens"] for engine in (rig.prefill, rig.decode) for each in engine.loads())
        )
        seen = f"freed after {took:.1f} s and {computed} of {LONG} tokens" if freed else "not freed"
        good = bool(freed) and bool(free) and computed < LONG
        rig.report.add(f"the client leaves, {'streamed' if stream else 'whole'}", seen, good=good)


def prefill_dies(rig: Rig) -> None:
    """Check that a stream with its KV cache continues, new requests fail immediately, and a restart ends that."""
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
        got = ask(rig.client, rig.url, Question("/v1/chat/completions", f"prefill is gone, {case}", stream=False))
        took = time.monotonic() - began
        seen = f"{got.status} after {took:.1f} s: {got.text[:100]}"
        # While the service sends a refused leg again, for a second, decode may notice by itself, and answer 500.
        good = got.status in ({502, 503} if rig.form == "envoy" else {500, 502, 503})
        rig.report.add(f"prefill is gone: a new request, {case}", seen, good=good)
    freed = _wait(lambda: all(not each["num_used_tokens"] for each in rig.decode.loads()))
    rig.report.add("prefill is gone: KV cache on decode", "free" if freed else "still reserved", good=bool(freed))

    rig.decode.lower_priority()
    rig.prefill.start()
    rig.prefill.wait_until_ready()
    began = time.monotonic()
    back = _wait(
        lambda: ask(rig.client, rig.url, Question("/v1/completions", "back again", stream=False)).status == 200
    )
    seen = f"200 after {time.monotonic() - began:.1f} s" if back else "no answer"
    rig.report.add("prefill is back: a new request", seen, good=bool(back))


def decode_dies(rig: Rig) -> None:
    """Check that a begun stream ends immediately, with an error event unless another gateway is in front.

    This is the last case, because the engine stays down.
    """
    question = Question("/v1/chat/completions", "decode dies", stream=True, tokens=300)
    with rig.client.stream("POST", rig.url + question.path, json=question.body()) as response:
        stream = events(response)
        next(stream)
        rig.decode.kill()
        killed, code = time.monotonic(), "cut"
        with suppress(httpx.RemoteProtocolError):
            last = list(stream)[-1]
            code = (last or {}).get("error", {}).get("code")
    took = time.monotonic() - killed
    expected = "cut" if rig.form == "picker" else "stream_cut"
    rig.report.add("SIGKILL to decode: a stream in flight", f"{code} after {took:.1f} s", good=code == expected)


CASES: Final[Sequence[Callable[[Rig], None]]] = (
    every_pair, picked_by_the_service, log_probabilities, echoed_prompts, too_long, client_disconnects, prefill_dies,
    decode_dies,
)  # fmt: skip


def unified_answers(client: httpx.Client, unified: RealEngine) -> Answers:
    """Send a unified engine every request that is compared with it."""
    return {key: ask(client, unified.url, question) for key, question in QUESTIONS.items()}


def unified_logprobs(client: httpx.Client, unified: RealEngine) -> dict[bool, dict[str, Any]]:
    """Request log probabilities from a unified engine."""
    return {stream: ask_meta(client, unified.url, question) for stream, question in LOGPROBS_QUESTIONS.items()}


def unified_echoes(client: httpx.Client, unified: RealEngine) -> Echoes:
    """Request log probabilities of echoed prompts from a unified engine."""
    return {
        (name, stream): ask_echo(client, unified.url, prompt, stream=stream)
        for name, prompt in ECHOED.items()
        for stream in (False, True)
    }


def _near(ours: Any, theirs: Any) -> bool:
    """Return whether two JSON values are the same except for rounding."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_near, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return isclose(ours, theirs, abs_tol=1e-4)
    return bool(ours == theirs)


def _computed(rig: Rig) -> tuple[list[int], list[int]]:
    return rig.prefill.computed(), rig.decode.computed()


def _moved(rig: Rig, before: tuple[list[int], list[int]]) -> tuple[int, int]:
    """Wait until the counters of one rank of each engine have moved, and return the ranks; -1 for none or several."""

    def moved() -> list[list[int]] | None:
        sides = [
            [rank for rank in RANKS if now[rank] > old[rank]] for now, old in zip(_computed(rig), before, strict=True)
        ]
        return sides if all(sides) else None

    sides = _wait(moved, 10) or [[], []]
    prefill, decode = (side[0] if len(side) == 1 else -1 for side in sides)
    return prefill, decode


def _wait(probe: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T | None:
    """Wait until a probe returns a true value, with a time limit."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(0.1)
    return None
