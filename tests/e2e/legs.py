"""The required form of both legs of a disaggregated request, release by release."""

from typing import Any

from e2e.stack import DECODE_RANKS, PREFILL_RANKS, ROUTING_FIELDS, Stack, body_of


def assert_legs(stack: Stack, sent: dict[str, Any], path: str, *, batch: int | None = None) -> tuple[int, int | None]:
    """Compare both legs with the client's request, field by field.

    Returns:
        The ranks on which the engines ran the legs; for decode None if the engine picked it.
    """
    prefill, decode = stack.legs()
    assert prefill["path"] == decode["path"] == path
    assert prefill["outcome"] == decode["outcome"] == "finished", (prefill, decode)
    on_prefill, on_decode = body_of(prefill), body_of(decode)
    _assert_the_rest_is_as_sent(sent, on_prefill, on_decode)
    _assert_meeting_point(stack, on_prefill, on_decode, prefill["rank"], batch)
    _assert_request_ids(on_prefill, on_decode, batch)
    _assert_ranks(stack, on_prefill, on_decode, prefill["rank"], decode["rank"])
    for request in (prefill, decode):
        assert not [name for name in request["headers"] if name.startswith(("x-dp-", "x-envoy-"))]
    return prefill["rank"], decode["rank"] if stack.version >= (0, 5, 10) else None


def _assert_the_rest_is_as_sent(sent: dict[str, Any], prefill: dict[str, Any], decode: dict[str, Any]) -> None:
    kept = {key: value for key, value in sent.items() if key not in ROUTING_FIELDS}
    assert {key: value for key, value in decode.items() if key not in ROUTING_FIELDS} == kept
    unstreamed = {key: value for key, value in kept.items() if key not in {"stream", "stream_options"}}
    unstreamed["stream"] = False
    assert {key: value for key, value in prefill.items() if key not in ROUTING_FIELDS} == unstreamed


def _assert_meeting_point(
    stack: Stack, prefill: dict[str, Any], decode: dict[str, Any], rank: int, batch: int | None
) -> None:
    assert prefill["bootstrap_room"] == decode["bootstrap_room"]
    rooms = [decode["bootstrap_room"]] if batch is None else decode["bootstrap_room"]
    assert len(set(rooms)) == (batch or 1)
    assert all(0 < room < 1 << 63 and room % PREFILL_RANKS == rank for room in rooms)
    for body in (prefill, decode):
        assert body["bootstrap_host"] == "127.0.0.1"
        assert body["bootstrap_port"] == stack.prefills[0].bootstrap_port


def _assert_request_ids(prefill: dict[str, Any], decode: dict[str, Any], batch: int | None) -> None:
    ids = [*prefill["rid"], *decode["rid"]] if batch is not None else [prefill["rid"], decode["rid"]]
    assert len(set(ids)) == 2 * (batch or 1)


def _assert_ranks(stack: Stack, prefill: dict[str, Any], decode: dict[str, Any], p: int, d: int) -> None:
    assert 0 <= p < PREFILL_RANKS
    assert 0 <= d < DECODE_RANKS
    fields = {"routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank"}
    for body, rank in ((prefill, p), (decode, d)):
        expected: dict[str, int] = {}
        if stack.version >= (0, 5, 10):
            expected["routed_dp_rank"] = rank
        if stack.version >= (0, 5, 11):
            expected["disagg_prefill_dp_rank"] = p
        assert {key: body[key] for key in fields & body.keys()} == expected
    if stack.version < (0, 5, 8):  # the room alone determines the rank on both engines
        room = decode["bootstrap_room"]
        rooms = room if isinstance(room, list) else [room]
        assert {room % DECODE_RANKS for room in rooms} == {d}
