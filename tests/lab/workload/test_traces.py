"""Test what traces are made of, that they are reproducible, and the errors of trace files."""

import statistics
from random import Random

import pytest

from dp_extproc.lab.workload.arrivals import BURST_SECONDS, CALM_SECONDS, arrivals
from dp_extproc.lab.workload.generate import NAMES, SESSIONS, make_trace
from dp_extproc.lab.workload.lengths import LENGTHS
from dp_extproc.lab.workload.trace import Language, Segment, TraceError, TraceRequest, read_trace, write_trace

MEANS = {
    "seed": (2560, 1160),
    "seed-prompts": (2560, 1),
    "sharegpt": (280, 245),
    "azure": (1330, 215),
    "agent": (6660, 270),
    "long": (6680, 230),
}
"""Tokens of prompts and answers, as the table in ``lengths.py`` has them."""


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_have_the_documented_means(name: str) -> None:
    """Ten thousand draws come within 5 %; the tail of the long mix allows for 10 %."""
    rng = Random(7)
    prompts, outputs = zip(*(LENGTHS[name](rng) for _ in range(10_000)), strict=True)
    tolerance = 0.1 if name == "long" else 0.05
    assert statistics.fmean(prompts) == pytest.approx(MEANS[name][0], rel=tolerance)
    assert statistics.fmean(outputs) == pytest.approx(MEANS[name][1], rel=tolerance)


def test_seed_lengths_keep_their_bounds() -> None:
    """Inputs of 1481-4120 tokens, outputs of 187-4068."""
    rng = Random(7)
    prompts, outputs = zip(*(LENGTHS["seed"](rng) for _ in range(10_000)), strict=True)
    assert min(prompts) >= 1481
    assert max(prompts) <= 4120
    assert min(outputs) >= 187
    assert max(outputs) <= 4068


@pytest.mark.parametrize("name", NAMES)
def test_trace_depends_on_the_seed(name: str) -> None:
    """Equal seeds make equal traces of the wanted length in the order of arrival, other seeds other ones."""
    trace = make_trace(name, 200, 10, seed=1)
    assert trace == make_trace(name, 200, 10, seed=1)
    assert trace != make_trace(name, 200, 10, seed=2)
    assert len(trace) == 200
    assert [request.arrival for request in trace] == sorted(request.arrival for request in trace)


def test_arrivals_have_the_rate() -> None:
    """4000 arrivals at 20 per second take about 200 seconds."""
    trace = make_trace("seed", 4000, 20, seed=3)
    assert trace[-1].arrival == pytest.approx(200, rel=0.05)


def test_bursts_keep_the_mean_rate() -> None:
    """With bursts of 2.5 times the rate, 62.5 % of the requests come in a quarter of the time."""
    period = BURST_SECONDS + CALM_SECONDS
    times = [request.arrival for request in make_trace("seed", 8000, 20, seed=3, burst=2.5)]
    assert times[-1] == pytest.approx(400, rel=0.05)
    assert statistics.fmean(time % period < BURST_SECONDS for time in times) == pytest.approx(0.625, abs=0.02)


@pytest.mark.parametrize(
    ("rate", "burst"), [pytest.param(0, 1, id="no rate"), pytest.param(10, 4.5, id="bursts with more than all")]
)
def test_arrivals_refuse_an_impossible_burst(rate: float, burst: float) -> None:
    """A quarter of the time cannot have more than four times the rate."""
    with pytest.raises(ValueError, match="no such arrivals"):
        next(arrivals(Random(1), rate, burst))


def test_conversation_repeats_its_earlier_turns() -> None:
    """Each turn's prompt begins with the whole prompt of the turn before it; conversations share system prompts."""
    before: dict[int, TraceRequest] = {}
    turns = 0
    for request in make_trace(SESSIONS, 500, 5, seed=1):
        assert request.session is not None
        earlier = before.get(request.session)
        if earlier is not None:
            assert request.prompt[: len(earlier.prompt)] == earlier.prompt
            assert request.prompt[len(earlier.prompt)].tokens == earlier.output_tokens
            turns += 1
        before[request.session] = request
    assert turns > 200
    assert len({request.prompt[0] for request in before.values()}) == 4


def test_conversations_share_only_the_system_prompt() -> None:
    """Behind the first segment no text occurs in two conversations."""
    owners: dict[Segment, int | None] = {}
    for request in make_trace(SESSIONS, 500, 5, seed=1):
        for segment in request.prompt[1:]:
            assert owners.setdefault(segment, request.session) == request.session


@pytest.mark.parametrize(("name", "share"), [("azure", 0.0), ("mixed", 0.5), ("chinese", 1.0)])
def test_chinese_traces_differ_only_in_language(name: str, share: float) -> None:
    """So results can be compared number by number."""
    trace, english = make_trace(name, 1000, 10, seed=1), make_trace("azure", 1000, 10, seed=1)
    assert [(request.arrival, request.prompt, request.output_tokens) for request in trace] == [
        (request.arrival, request.prompt, request.output_tokens) for request in english
    ]
    assert statistics.fmean(request.language is Language.CHINESE for request in trace) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("name", ["mixed", SESSIONS])
def test_written_trace_is_read_back(name: str) -> None:
    """Segments, sessions and languages are in it."""
    trace = make_trace(name, 100, 5, seed=1)
    assert read_trace(write_trace(trace)) == trace


def test_prompts_without_segments_share_nothing() -> None:
    """Two lines of the same length are two different prompts; empty lines are skipped, late ones sorted."""
    lines = [
        '{"arrival": 2, "prompt_tokens": 10, "output_tokens": 3}\n',
        "\n",
        '{"arrival": 1, "prompt_tokens": 10, "output_tokens": 4}\n',
    ]
    first, second = read_trace(lines)
    assert (first.arrival, first.output_tokens, second.arrival) == (1, 4, 2)
    assert first.prompt_tokens == second.prompt_tokens == 10
    assert first.prompt != second.prompt


def test_error_has_all_bad_lines() -> None:
    """Each has its number and the reason."""
    lines = [
        '{"arrival": 0, "prompt_tokens": 10, "output_tokens": 3}',
        "no json",
        '{"arrival": -1, "prompt_tokens": 10, "output_tokens": 3}',
        '{"arrival": 0, "prompt_tokens": 10, "output_tokens": 3, "colour": 1}',
        '{"arrival": 0, "prompt_tokens": 10, "output_tokens": 3, "prompt": [[1, 4], [2, 5]]}',
    ]
    with pytest.raises(TraceError) as caught:
        read_trace(lines)
    printed_text = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in printed_text] == ["line 2", "line 3", "line 4", "line 5"]
    assert "arrival" in printed_text[1]
    assert "colour" in printed_text[2]
    assert "add up" in printed_text[3]


def test_error_counts_many_bad_lines() -> None:
    """Ten are printed, the others counted."""
    with pytest.raises(TraceError, match=r"\nand 90 more$"):
        read_trace(["{}"] * 100)


def test_empty_trace_is_refused() -> None:
    """A file of empty lines has no requests."""
    with pytest.raises(TraceError, match="no requests"):
        read_trace(["\n"])
