"""The bodies of the legs have the expected bytes, in texts whose parts are known because they are built here."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dp_extproc.request.members import JsonObject
from dp_extproc.request.rewrite import (
    LEG_KEYS,
    ROUTING_KEYS,
    STREAM_KEYS,
    Bootstrap,
    LegFields,
    rewrite_aggregated,
    rewrite_disaggregated,
)
from request.json_texts import ObjectText, objects, read_pairs

BOOTSTRAP = Bootstrap("10.0.0.1", 8998, 77)
PREFILL = LegFields(routed_rank=1, prefill_rank=1, request_id="a-p")
DECODE = LegFields(routed_rank=2, prefill_rank=1, request_id="a-d")

SHARED = [("bootstrap_host", "10.0.0.1"), ("bootstrap_port", "8998"), ("bootstrap_room", "77")]
PREFILL_LEG = [("routed_dp_rank", "1"), ("disagg_prefill_dp_rank", "1"), ("rid", "a-p"), ("stream", False)]
DECODE_LEG = [("routed_dp_rank", "2"), ("disagg_prefill_dp_rank", "1"), ("rid", "a-d")]


@given(objects)
@example(ObjectText("", [], "", ""))
@example(ObjectText("\n", [], " \t", "\r\n"))
def test_only_leg_keys_change(body: ObjectText) -> None:
    """Any object has in both legs its leg keys replaced and every other byte in its place."""
    client = read_pairs(body.text)
    others = [(key, value) for key, value in client if key not in LEG_KEYS]
    streaming = [(key, dict(client)[key]) for key in STREAM_KEYS if key in dict(client)]

    legs = rewrite_disaggregated(JsonObject(body.text), None, BOOTSTRAP, PREFILL, DECODE)

    assert read_pairs(legs.decode) == DECODE_LEG + streaming + SHARED + others
    assert read_pairs(legs.prefill) == PREFILL_LEG + SHARED + others
    shared = legs.decode[legs.preamble_length :]
    assert shared == legs.prefill[len(legs.prefill_preamble) :]
    opening = b'"bootstrap_host":"10.0.0.1","bootstrap_port":8998,"bootstrap_room":77'
    comma = b"," if body.kept(LEG_KEYS) else b""
    behind = body.behind_the_brace(LEG_KEYS)
    assert shared == opening + comma + behind


@given(objects, st.sampled_from(["routed_dp_rank", "data_parallel_rank", None]), st.sampled_from([0, 3, None]))
@example(ObjectText("", [], "", ""), "routed_dp_rank", 1)
def test_aggregated_body_changes_in_its_rank_alone(body: ObjectText, rank_key: str | None, rank: int | None) -> None:
    """At most one rank replaces all routing keys; ``rid`` and ``stream`` stay as the client sent them."""
    others = [(key, value) for key, value in read_pairs(body.text) if key not in ROUTING_KEYS]
    ours = [(rank_key, str(rank))] if rank_key is not None and rank is not None else []

    rewritten = rewrite_aggregated(JsonObject(body.text), rank_key, rank)

    assert read_pairs(rewritten) == ours + others
    field = f'"{rank_key}":{rank}'.encode() if ours else b""
    comma = b"," if field and body.kept(ROUTING_KEYS) else b""
    assert rewritten == b"{" + field + comma + body.behind_the_brace(ROUTING_KEYS)


@given(objects)
def test_values_by_key_are_those_of_the_last_member(body: ObjectText) -> None:
    """Of repeated keys the last value is taken, as by the JSON reader of Python, and so of SGLang."""
    values = {key: read_pairs(b'{"v":%s}' % bytes(raw)) for key, raw in JsonObject(body.text).values.items()}
    assert values == {key: [("v", value)] for key, value in read_pairs(body.text)}


BYTES = {
    "number-formats": b'{"a":1.0e+5,"b":-0,"c":1E400,"rid":1,"d":0.10}',
    "integer-of-5000-digits": b'{"stream":true,"a":' + b"9" * 5000 + b"}",
    "key-with-escapes": b'{"\\u0072id":"x","a":1}',
    "key-with-escapes-in-upper-case": b'{"\\u0072i\\u0064":"x","strea\\u006D":true,"a":1}',
    "key-that-only-looks-escaped": b'{"\\\\u0072id":"x","a":1}',
    "repeated-leg-keys": b'{"rid":1,"a":1,"rid":2,"b":2,"rid":3}',
    "repeated-other-keys": b'{"a":1,"a":2,"rid":3,"a":[1,1]}',
    "leg-keys-only": b'{"rid":1, "stream" :true}',
    "leg-keys-inside": b'{"a":{"rid":1,"bootstrap_room":[{"stream":{}}]},"b":["rid"]}',
    "every-kind-of-space": b' \t\n\r{ \t\n\r"rid" \t\n\r: \t\n\r1 \t\n\r, \t\n\r"a" \t\n\r:[ \t\n\r] \t\n\r} \t\n\r',
    "unicode": '{"a":"漢字🦊é","rid":1,"ключ":"\u2028\x7f"}'.encode(),
    "braces-in-strings": b'{"a":"}{,\\":","rid":"}\\\\","b":"\\""}',
    "an-empty-key": b'{"":"","rid":""}',
    "a-large-value": b'{"rid":1,"a":"' + b"x" * 1_000_000 + b'","stream":false}',
    "nested-900-deep": b'{"a":' + b"[" * 900 + b"]" * 900 + b',"rid":1}',
}


@pytest.mark.parametrize("text", BYTES.values(), ids=BYTES)
def test_unusual_spelling_keeps_its_bytes(text: bytes) -> None:
    """Spellings that a serialisation would change stay as they are."""
    legs = rewrite_disaggregated(JsonObject(text), None, BOOTSTRAP, PREFILL, DECODE)
    others = [(key, value) for key, value in read_pairs(text) if key not in LEG_KEYS]
    assert read_pairs(legs.prefill) == PREFILL_LEG + SHARED + others
    assert [pair for pair in read_pairs(legs.decode) if pair[0] not in LEG_KEYS] == others
