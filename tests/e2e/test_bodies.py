"""Bodies of every size and kind arrive on both legs as the client sent them, in both of Envoy's body modes."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from e2e.legs import assert_legs
from e2e.stack import Stack, body_of

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PATH = "/v1/completions"


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "any", "prompt": "p", "max_tokens": 1, **fields}


def test_the_smallest_bodies_are_read_correctly(every_mode: Stack) -> None:
    """One byte is rejected as not being a JSON object, and the smallest object that is a request passes."""
    refused = every_mode.client.post(PATH, content=b"1", headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert every_mode.received() == []
    sent = b'{"prompt":"p","max_tokens":1}'
    assert every_mode.client.post(PATH, content=sent, headers={"content-type": "application/json"}).status_code == 200
    assert_legs(every_mode, json.loads(sent), PATH)


@pytest.mark.parametrize("size", [1_000, 62_000, 70_000, 1 << 20, 32 << 20], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("chunked", [False, True], ids=["with length", "chunked"])
def test_large_bodies_arrive_unchanged_on_both_legs(every_mode: Stack, size: int, chunked: bool) -> None:
    """From one to many chunks, with and without a content-length, no byte after the routing fields differs."""
    # Not in the prompt: an engine would rightly reject eight million tokens.
    rest = b'"model":"any","max_tokens":1,"prompt":"p","padding":"' + b"0123456789abcdef" * (size // 16) + b'"}'
    content: bytes | Iterator[bytes] = b"{" + rest
    if chunked:
        content = iter([b"{", *(rest[start : start + 100_001] for start in range(0, len(rest), 100_001))])
    response = every_mode.client.post(PATH, content=content, headers={"content-type": "application/json"})

    assert response.status_code == 200, response.text[:500]
    for leg in every_mode.legs():
        assert leg["outcome"] == "finished"
        # In full-duplex mode Envoy streams the decode leg's body, without a length.
        assert leg["headers"].get("content-length", str(leg["body_length"])) == str(leg["body_length"])
        front = (leg["body"] or leg["body_head"])[: leg["body_length"] - len(rest)].encode()
        assert leg["body_sha256"] == hashlib.sha256(front + rest).hexdigest()


def test_a_compact_unicode_body_is_kept_byte_for_byte(every_mode: Stack) -> None:
    """Key order, number formats, escapes, repeated keys and white space arrive as the client sent them."""
    sent = (
        b'{ "prompt" : "\\u00e9 \xc3\xa9 \xf0\x9f\x97\xbc \\ud83d\\uddfc" , "temperature":1.0E+0,"seed":-0 , '
        b'"x": 123456789012345678901234567890,"x":[1e-7,{"stream":1,"rid":2}],\t"max_tokens":1 }'
    )
    response = every_mode.client.post(PATH, content=sent, headers={"content-type": "application/json"})

    assert response.status_code == 200, response.text
    for leg in every_mode.legs():
        assert leg["body"].encode().endswith(sent[1:])


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"routed_dp_rank": 1, "disagg_prefill_dp_rank": 0, "data_parallel_rank": 1}, id="ranks"),
        pytest.param({"routed_dp_rank": 99, "data_parallel_rank": -1}, id="ranks out of range"),
        pytest.param(
            {"bootstrap_host": "192.0.2.1", "bootstrap_port": 1, "bootstrap_room": 0}, id="a meeting point of its own"
        ),
        pytest.param({"rid": "mine"}, id="request id"),
        pytest.param({"bootstrap_room": [1, 2], "bootstrap_host": None, "routed_dp_rank": "x"}, id="wrong types"),
    ],
)
def test_routing_fields_of_a_client_are_replaced(every_mode: Stack, fields: dict[str, Any]) -> None:
    """Both legs get the routing fields of the service once, whatever fields the client sent."""
    response = every_mode.client.post(PATH, json=completion(**fields))

    assert response.status_code == 200, response.text
    assert_legs(every_mode, completion(**fields), PATH)
    for leg in every_mode.legs():
        keys = [key for key, _ in json.loads(leg["body"], object_pairs_hook=list)]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-dp-decode-host", "127.0.0.1:1"),
        ("x-dp-prefill-host", "127.0.0.1:1"),
        ("x-dp-prefill-prefix", "{"),
        ("x-dp-prefix-length", "1"),
        ("x-dp-owner", "127.0.0.1:1"),
        ("x-dp-leg", "0"),
        ("x-data-parallel-rank", "7"),
        ("x-override-routed-dp-rank", "7"),
        ("x-envoy-retry-on", "5xx"),
    ],
)
def test_routing_headers_of_a_client_have_no_effect(every_mode: Stack, name: str, value: str) -> None:
    """A client cannot choose an endpoint, a rank or a leg by a header, and no such header reaches an engine."""
    response = every_mode.client.post(PATH, json=completion(), headers={name: value})

    assert response.status_code == 200, response.text
    assert_legs(every_mode, completion(), PATH)
    for leg in every_mode.legs():
        assert name not in leg["headers"]


def test_other_headers_reach_both_engines(every_mode: Stack) -> None:
    """Credentials and request ids of a client reach both engines, and with a mirrored leg all other headers."""
    common = {"authorization": "Bearer key", "x-request-id": "my-id", "traceparent": TRACE, "tracestate": "a=b"}
    headers = {**common, "x-tenant": "blue"}
    assert every_mode.client.post(PATH, json=completion(), headers=headers).status_code == 200
    prefill, decode = every_mode.legs()

    sent_here = every_mode.service.config.sends_legs
    for leg, expected in ((prefill, common if sent_here else headers), (decode, headers)):
        assert {name: leg["headers"][name] for name in headers if name in leg["headers"]} == expected


def test_a_body_passes_with_white_space_around_it(every_mode: Stack) -> None:
    """A body may begin and end in white space, and its content type may have parameters."""
    sent = b'\n{"prompt":"p","max_tokens":1}\n\n'
    response = every_mode.client.post(PATH, content=sent, headers={"content-type": "application/json; charset=utf-8"})

    assert response.status_code == 200, response.text
    assert body_of(every_mode.legs()[1])["prompt"] == "p"


def test_the_access_log_names_the_pick(every_mode: Stack) -> None:
    """The access log line of a request has its model, pool, endpoints and ranks."""
    headers = {"x-request-id": f"logged-{every_mode.service.config.envoy.body_mode}"}
    assert every_mode.client.post(PATH, json=completion(model="m1"), headers=headers).status_code == 200
    prefill_rank, decode_rank = assert_legs(every_mode, completion(model="m1"), PATH)
    lines = every_mode.envoy.wait_for_access_log(
        headers["x-request-id"], 1 if every_mode.service.config.sends_legs else 2
    )
    line = next(line for line in lines if line["leg"] == "main")

    assert {key: line[key] for key in ("model", "pool", "prefill_rank", "decode_rank", "status")} == {
        "model": "m1",
        "pool": "*",
        "prefill_rank": prefill_rank,
        "decode_rank": decode_rank,
        "status": 200,
    }
    assert f"http://{line['prefill_host']}" == every_mode.prefills[0].url
    assert f"http://{line['decode_host']}" == every_mode.decodes[0].url


def test_a_stream_arrives_piece_by_piece_in_both_body_modes(every_mode: Stack) -> None:
    """A streamed response arrives piece by piece, not all at the end."""
    sent = completion(stream=True, max_tokens=5)
    with every_mode.client.stream("POST", PATH, json=sent) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        pieces = [line for line in response.iter_lines() if line.startswith("data: ")]

    assert pieces[-1] == "data: [DONE]"
    assert len(pieces) >= 5
    assert isinstance(response, httpx.Response)
