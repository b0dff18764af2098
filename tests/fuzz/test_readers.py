"""The fast readers against slow ones that are known to be right."""

import json
from collections import defaultdict
from typing import Any, NoReturn

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from dp_extproc.engines.sglang.load_pages import read_loads, read_metrics
from dp_extproc.request.members import JsonObject
from fuzz.effort import examples
from request.json_texts import ObjectText, objects, read_pairs

_SPLINTERS = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"nul",
    b"1e9",
    b"-",
    b"\\u00e9",
    b"\xff",
    b"\0",
    b" ",
    b"",
]


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """An object's text with a few bytes replaced."""
    whole: ObjectText = draw(objects)
    text = whole.text
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 3)))
        text = text[:start] + draw(st.sampled_from(_SPLINTERS)) + text[end:]
    return text


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _reference(text: bytes) -> list[tuple[str, Any]] | None:
    """Read an object slowly; None if it is none."""
    try:
        found = json.loads(text.decode(), parse_constant=_no_constant, parse_float=str, parse_int=str)
    except ValueError:
        return None
    return read_pairs(text) if isinstance(found, dict) else None


def _has_half_a_character(text: bytes) -> bool:
    """Tell whether a string has one half of a surrogate pair, which Python lets through and msgspec does not."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


@examples(150)
@given(_damaged(), st.frozensets(st.sampled_from(["rid", "stream", "routed_dp_rank", ""])))
def test_the_scanner_is_as_strict_as_the_reference(text: bytes, unwanted: frozenset[str]) -> None:
    """The scanner takes what Python's reader takes, refuses what it refuses, and leaves the same members."""
    expected = _reference(text)
    try:
        scanned = JsonObject(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        assert expected is None or _has_half_a_character(text)
        return
    assert expected is not None
    assert read_pairs(b"{" + b"".join(scanned.without(unwanted))) == [
        (key, value) for key, value in expected if key not in unwanted
    ]


_names = st.sampled_from([
    "num_used_tokens", "num_running_reqs", "num_queue_reqs", "max_total_num_tokens", "num_used_tokens_total",
    "gen_throughput", "num_prefill_inflight_queue_reqs", "num_used", "foreign",
])  # fmt: skip
_labels = st.sampled_from(
    ["", '{dp_rank="0"}', '{dp_rank="1"}', '{model_name="a",dp_rank="2"}', '{dp_rank="1",priority=""}']
)
_values = st.integers(0, 10**9).map(float) | st.floats(0, 1e9)


@examples(60)
@given(st.lists(st.tuples(_names, _labels, _values), max_size=20))
def test_the_metrics_reader_misses_nothing(series: list[tuple[str, str, float]]) -> None:
    """Picking lines before they are parsed gives what parsing all of them gives."""
    page = "# HELP sglang:x y\n" + "".join(f"sglang:{name}{labels} {value}\n" for name, labels, value in series)
    used: dict[int, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "sglang:num_used_tokens":
                rank = int(sample.labels.get("dp_rank", "0"))
                used[rank] = max(used[rank], sample.value)

    found = read_metrics(page.encode())

    assert {sample.dp_rank: sample.used_tokens for sample in found.ranks} == {r: round(v) for r, v in used.items()}


@examples(60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10**9), st.integers(1, 100)), max_size=12))
def test_the_loads_reader_takes_the_newest_of_each_rank(loads: list[tuple[int, int, int]]) -> None:
    """A rank that is told several times counts once, by its newest numbers."""
    page = {"loads": [{"dp_rank": rank, "num_used_tokens": used, "timestamp": at} for rank, used, at in loads]}
    newest: dict[int, tuple[int, int]] = {}
    for rank, used, at in loads:
        if at >= newest.get(rank, (0, 0))[0]:
            newest[rank] = (at, used)

    found = read_loads(json.dumps(page).encode())

    assert {each.dp_rank: each.used_tokens for each in found.ranks} == {r: used for r, (_, used) in newest.items()}
