"""In the bodies of the legs the leg keys are ours, and every other byte is the client's."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dp_extproc.request.members import JsonObject
from dp_extproc.request.rewrite import (
    LEG_KEYS,
    ROUTING_KEYS,
    Bootstrap,
    LegFields,
    rewrite_aggregated,
    rewrite_disaggregated,
)

BOOTSTRAP = Bootstrap("10.0.0.1", 8998, 77)
PREFILL = LegFields(routed_rank=1, prefill_rank=1, request_id="p")
DECODE = LegFields(routed_rank=2, prefill_rank=1, request_id="d")

SPACE = st.text(" \t\n\r", max_size=2)
NUMBERS = st.sampled_from(["0", "-0", "1.0e+5", "1E400", "123456789012345678901234567890", "0.10", "-1e-7"])
NAMES = st.one_of(st.sampled_from(sorted(LEG_KEYS)), st.text(max_size=6))


def quote(text: str, escape: bool) -> str:
    """Write a JSON string, with or without escaping every character."""
    if not escape:
        return json.dumps(text, ensure_ascii=False)
    return '"' + "".join(f"\\u{unit:04x}" for unit in memoryview(text.encode("utf-16-le")).cast("H")) + '"'


def arrays(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(SPACE, st.lists(children, max_size=3)).map(lambda parts: f"[{parts[0]}{','.join(parts[1])}]")


STRINGS = st.builds(quote, st.text(max_size=8), st.booleans())
KEYS = st.builds(quote, NAMES, st.booleans())
MEMBER = st.tuples(SPACE, KEYS, SPACE, SPACE)


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Draw JSON objects as text, with repeated keys, escapes and white space of all kinds."""
    member = st.tuples(MEMBER, values, SPACE).map(lambda m: f"{m[0][0]}{m[0][1]}{m[0][2]}:{m[0][3]}{m[1]}{m[2]}")
    body = st.lists(member, max_size=6).map(",".join)
    return st.tuples(SPACE, body).map(lambda parts: "{" + (parts[1] or parts[0]) + "}")


VALUES = st.recursive(
    st.one_of(NUMBERS, STRINGS, st.sampled_from(["true", "false", "null"])),
    lambda children: st.one_of(arrays(children), objects(children)),
    max_leaves=6,
)
BODIES = st.tuples(SPACE, objects(VALUES), SPACE).map(lambda parts: "".join(parts).encode())


def pairs(text: bytes) -> list[tuple[str, Any]]:
    """Read an object by other means than the code under test: keys in order, numbers as they are written."""
    read: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list, parse_int=str, parse_float=str)
    return read


@given(BODIES)
@example(b"{}")
@example(b'{"stream":1}')
@example(b' { "rid" : 1 , "a":[1,{"rid":2}], "rid":"x,\\"b\\":1", "b":"\xc3\xa9" } \n')
def test_only_leg_keys_change(text: bytes) -> None:
    """Behind our keys stand exactly the other members of the client, in order, however its keys are written."""
    body = JsonObject(text)
    legs = rewrite_disaggregated(body, None, BOOTSTRAP, PREFILL, DECODE)
    kept = [(key, value) for key, value in pairs(text) if key not in LEG_KEYS]
    shared = [("bootstrap_host", "10.0.0.1"), ("bootstrap_port", "8998"), ("bootstrap_room", "77")]
    last = {key: value for key, value in pairs(text) if key in {"stream", "stream_options"}}
    streaming = [(key, last[key]) for key in ("stream", "stream_options") if key in last]

    assert pairs(legs.decode) == [
        ("routed_dp_rank", "2"), ("disagg_prefill_dp_rank", "1"), ("rid", "d"), *streaming, *shared, *kept,
    ]  # fmt: skip
    assert pairs(legs.prefill) == [
        ("routed_dp_rank", "1"), ("disagg_prefill_dp_rank", "1"), ("rid", "p"), ("stream", False), *shared, *kept,
    ]  # fmt: skip


@given(BODIES)
def test_every_other_byte_stays(text: bytes) -> None:
    """A body without leg keys stands whole behind ours; of one with some, only pieces of it are left."""
    body = JsonObject(text)
    legs = rewrite_disaggregated(body, None, BOOTSTRAP, PREFILL, DECODE)
    inner = text[text.index(b"{") + 1 :]

    if not body.values.keys() & LEG_KEYS:
        assert legs.decode.endswith(inner)
    position = 0
    for piece in body.without(LEG_KEYS):
        position = text.index(bytes(piece), position)


@given(BODIES)
def test_aggregated_body_gets_only_the_rank(text: bytes) -> None:
    """Streaming and ids stay as the client sent them; only routing keys go."""
    kept = [(key, value) for key, value in pairs(text) if key not in ROUTING_KEYS]

    assert pairs(rewrite_aggregated(JsonObject(text), "routed_dp_rank", 3)) == [("routed_dp_rank", "3"), *kept]
    assert pairs(rewrite_aggregated(JsonObject(text), None, None)) == kept


@pytest.mark.parametrize("batch", [1, 2, 13])
def test_batch_has_an_id_for_each_prompt(batch: int) -> None:
    """Lists of ids go with lists of prompts, and no id is the start of another."""
    rooms = list(range(1, batch + 1))
    legs = rewrite_disaggregated(JsonObject(b'{"prompt":[]}'), batch, Bootstrap("h", 1, rooms), PREFILL, DECODE)
    ids = [*json.loads(legs.prefill)["rid"], *json.loads(legs.decode)["rid"]]

    assert len(set(ids)) == 2 * batch
    assert not any(a is not b and b.startswith(a) for a in ids for b in ids)
    assert json.loads(legs.decode)["bootstrap_room"] == rooms


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        pytest.param(LegFields(None, None, "p"), LegFields(None, None, "d"), id="no rank fields"),
        pytest.param(LegFields(1, None, "p"), LegFields(2, None, "d"), id="routed only"),
        pytest.param(LegFields(None, 1, "p"), LegFields(None, 1, "d"), id="prefill rank only"),
    ],
)
def test_field_without_a_value_is_left_out(prefill: LegFields, decode: LegFields) -> None:
    """A routing field that is None is not in the body at all."""
    legs = rewrite_disaggregated(JsonObject(b'{"a":1}'), None, BOOTSTRAP, prefill, decode)

    for fields, text in ((prefill, legs.prefill), (decode, legs.decode)):
        body = json.loads(text)
        assert body.get("routed_dp_rank") == fields.routed_rank
        assert body.get("disagg_prefill_dp_rank") == fields.prefill_rank
        assert (fields.routed_rank is None) == ("routed_dp_rank" not in body)


def test_preamble_fits_a_header() -> None:
    """A header has the preamble of the prefill leg: printable ASCII, whatever the client sent."""
    body = JsonObject('{"rid":"é\\r\\nx-dp-owner: evil","stream":true,"a":"é"}'.encode())
    legs = rewrite_disaggregated(body, 3, Bootstrap("h", 1, [1, 2, 3]), PREFILL, DECODE)

    assert re.fullmatch(rb"[\x20-\x7e]+", legs.prefill_preamble)
