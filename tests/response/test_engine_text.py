"""Clients get the text of an engine's error without what the router has added to their requests."""

import json
from typing import Any

import pytest

from dp_extproc.response.engine_text import no_answer, reshape, scrub

OWN: dict[str, Any] = {"model": "m", "n": 1, "messages": [{"role": "robot", "content": "'a', \"b\""}]}
ONE = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7, "rid": "dp1", "routed_dp_rank": 3}
BATCH = {"bootstrap_host": ["::1", "::1"], "bootstrap_port": [1, None], "bootstrap_room": [7, 8], "rid": ["a", "b"]}


@pytest.mark.parametrize("added", [ONE, BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(repr, id="python"),
        pytest.param(json.dumps, id="json"),
        pytest.param(lambda body: json.dumps({"message": f"1 validation error: {body!r}"}), id="python in json"),
        pytest.param(lambda body: json.dumps({"message": json.dumps(body)}), id="json in json"),
    ],
)
def test_routing_fields_leave_the_text(write: Any, is_last: bool, added: dict[str, Any]) -> None:
    """Validation errors repeat the whole input, at any depth of quotes; the client's own fields stay."""
    whole = {**OWN, **added} if is_last else {**added, **OWN}

    assert scrub(write(whole).encode()) == write(OWN).encode()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b"failed for req.rid='dp1' req.bootstrap_room=7 with x", b"failed for   with x"),
        (b"Request dp0123456789abcdef01234567d-0. exceeds 5 tokens", b"Request (id) exceeds 5 tokens"),
        (b"no connection to 10.1.2.3:8998 or [fd00::1]:9", b"no connection to (address) or (address)"),
        (b"100.64.0.1 172.16.0.1 192.168.0.1 127.0.0.1:1", b"(address) (address) (address) (address)"),
        (b"of 100.1.2.3, version 0.5.23.1 and 110.0.0.1", b"of 100.1.2.3, version 0.5.23.1 and 110.0.0.1"),
        (b"[type=x, input_value={'bootstrap_host': '10....4, 'a': 1}, input_type=dict]", b"[type=x, input_type=dict]"),
        (b"the grid: 3, 'grid': 5 and a room=4", b"the grid: 3, 'grid': 5 and a room=4"),
    ],
)
def test_ids_and_private_addresses_leave_the_text(text: bytes, left: bytes) -> None:
    """Errors of a transfer name both engines; all other words stay."""
    assert scrub(text) == left


@pytest.mark.parametrize("piece", [b"\\", b"'", b"a.", b"a=", b", ", b"{", b"1.", b"'rid': ['a', ", b"input_value={"])
def test_hostile_text_is_scrubbed_in_linear_time(piece: bytes) -> None:
    """Engines repeat what clients send. Quadratic time would take minutes here."""
    assert scrub(piece * (200_000 // len(piece)))


def test_answer_of_the_proxy_is_told_from_that_of_an_engine() -> None:
    """The text has the cause alone."""
    envoy = b"upstream connect error or disconnect/reset before headers. reset reason: remote connection failure"
    assert no_answer(envoy) == "remote connection failure"
    assert no_answer(b'{"message":"upstream connect error"}') is None
    assert no_answer(b"") is None


def test_flat_error_of_an_engine_gets_the_member_that_official_clients_read() -> None:
    """Node's client of OpenAI shows `400 status code (no body)` without it. Other bodies pass as they are."""
    flat = {"object": "error", "message": "m", "type": "BadRequestError", "param": None, "code": 400}
    error = {name: flat[name] for name in ("message", "type", "param", "code")}
    text = json.dumps(flat).encode()

    assert json.loads(reshape(text, "k")) == {"error": error, **flat}
    for other in (b'{"error":{"message":"m"}}', b"no json", b"[]", b'{"message":1}', b""):
        assert reshape(other, "k") == other
