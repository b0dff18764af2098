"""Requests through a real Envoy with the printed configuration, in both body modes."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from dp_extproc import contract
from dp_extproc.config import BodyMode
from envoy_config.harness import BODY, Bench, error_of, run_bench
from envoy_config.recording_engine import RecordingEngine
from envoy_config.scripted_service import DECODE_PREFIX, LEG_TOKEN, PREFILL_PREFIX

OWN_HEADERS = ("x-dp-", "x-envoy-", "x-override-", "x-data-parallel-rank")


def test_each_leg_gets_its_own_body_and_the_client_decodes_response(bench: Bench) -> None:
    """Decode gets the body of the service, and prefill the same body with its own leg preamble."""
    request_id, response = bench.post(BODY)

    assert response.json()["answered_by"] == "decode"
    assert bench.decode.one(request_id).body == DECODE_PREFIX + BODY[1:]
    assert bench.prefill.one(request_id).body == PREFILL_PREFIX + BODY[1:]


@pytest.mark.parametrize("leg", ["decode", "prefill"])
def test_no_steering_header_reaches_an_engine(bench: Bench, leg: str) -> None:
    """The x-dp-* headers select the endpoints and are removed before these, like the headers that Envoy adds."""
    request_id, _ = bench.post(BODY)

    engine: RecordingEngine = getattr(bench, leg)
    headers = engine.one(request_id).headers
    assert [name for name in headers if name.startswith(OWN_HEADERS)] == []
    assert headers["host"] == bench.envoy.url.removeprefix("http://")


@pytest.mark.parametrize(
    "header",
    [
        contract.DECODE_HOST,
        contract.PREFILL_HOST,
        "X-DP-Owner",
        "x-dp-anything",
        "x-override-bootstrap-room",
        "x-data-parallel-rank",
        "x-envoy-upstream-rq-timeout-ms",
        "x-envoy-retry-on",
    ],
)
def test_untrusted_header_of_a_client_is_removed_before_the_service(bench: Bench, header: str) -> None:
    """A client cannot name endpoints, ranks or options of Envoy. Its request is scheduled like others."""
    request_id, response = bench.post(BODY, **{header: "127.0.0.1:1"})

    assert response.status_code == 200
    seen = next(seen for seen in bench.service.seen_headers if seen["x-request-id"] == request_id)
    assert header.lower() not in seen
    assert header.lower() not in bench.decode.one(request_id).headers


def test_credentials_reach_the_engine_but_not_the_service(bench: Bench) -> None:
    """The service has no use for API keys, and the engine may ask for them."""
    request_id, _ = bench.post(BODY, authorization="Bearer secret", x_api_key="secret")

    seen = next(seen for seen in bench.service.seen_headers if seen["x-request-id"] == request_id)
    assert {"authorization", "x-api-key"}.isdisjoint(seen)
    assert bench.decode.one(request_id).headers["authorization"] == "Bearer secret"


def test_request_is_not_mirrored_without_a_prefill_endpoint(bench: Bench) -> None:
    """The only leg has the body as the service left it."""
    request_id, response = bench.post(BODY, test_one_server="1")

    assert response.status_code == 200
    assert bench.decode.one(request_id).body == BODY
    assert bench.log_line(request_id, "main")["prefill_host"] is None
    assert bench.prefill.of(request_id) == []


def test_request_without_a_body_goes_to_one_endpoint(bench: Bench) -> None:
    """The service schedules such a request by its headers alone."""
    response = bench.client.get("/health")

    assert response.json() == {"answered_by": "decode", "bytes": 0}


def test_chunked_upload_is_rewritten_on_both_legs(bench: Bench) -> None:
    """A client may send a body without its length."""

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(BODY), 7):
            yield BODY[start : start + 7]

    request_id, response = bench.post(chunks())

    assert response.status_code == 200
    assert bench.decode.one(request_id).body == DECODE_PREFIX + BODY[1:]
    prefill = bench.prefill.one(request_id)
    assert prefill.body == PREFILL_PREFIX + BODY[1:]
    assert prefill.headers["content-length"] == str(len(prefill.body))
    assert "transfer-encoding" not in prefill.headers


def test_body_of_32_mib_passes_both_legs(bench: Bench) -> None:
    """The buffers of all hops hold a large body, which arrives byte for byte."""
    body = b'{"prompt":"' + bytes(range(32, 34)) * (16 << 20) + b'"}'

    request_id, response = bench.post(body)

    assert response.status_code == 200
    assert bench.decode.one(request_id).body == DECODE_PREFIX + body[1:]
    assert bench.prefill.one(request_id).body == PREFILL_PREFIX + body[1:]


def test_leg_preamble_of_a_large_batch_fits_into_its_header(bench: Bench) -> None:
    """The internal listeners accept 900 kB of routing fields."""
    request_id, response = bench.post(BODY, test_longer_prefix="900000")

    assert response.status_code == 200
    assert len(bench.prefill.one(request_id).body) == len(PREFILL_PREFIX) + 900_000 + len(BODY) - 1


@pytest.mark.parametrize("length", ["", "x", "-1", "1.5", "nan", "1000000"])
def test_prefill_leg_is_not_forwarded_without_a_usable_leg_preamble(bench: Bench, length: str) -> None:
    """A body with the routing fields of the decode leg must not reach a prefill engine."""
    request_id, _ = bench.post(BODY, test_prefix_length=length)

    assert bench.log_line(request_id, "prefill")["status"] == 500
    assert bench.prefill.of(request_id) == []


@pytest.mark.parametrize(
    ("request_headers", "status"),
    [
        pytest.param({}, "200", id="answered"),
        pytest.param({"test-prefill-host": "127.0.0.1:1"}, "503", id="connection refused"),
        pytest.param({"test-prefix-length": "x"}, "500", id="not forwarded"),
    ],
)
def test_prefill_leg_reports_its_status_to_the_owner(
    bench: Bench, request_headers: dict[str, str], status: str
) -> None:
    """The report goes to the address in the owner header and carries the leg's token."""
    bench.service.prefill_reports.clear()

    request_id, _ = bench.post(BODY, **request_headers)

    assert bench.log_line(request_id, "prefill")["status"] == int(status)
    (report,) = bench.service.prefill_reports
    assert report.status == status
    assert report.metadata[contract.OWNER] == bench.service.owner
    assert report.metadata[contract.LEG] == LEG_TOKEN


def test_refusal_of_the_service_passes_unchanged(bench: Bench) -> None:
    """Status, body and headers of an ImmediateResponse with a reason are the service's own."""
    request_id, response = bench.post(BODY, test_refuse="with-reason")

    assert response.status_code == 429
    assert response.json() == {"error": {"message": "full", "code": "of the service"}}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["retry-after"] == "7"
    line = bench.log_line(request_id, "main")
    assert (line["reason"], line["response_code_details"]) == ("no_capacity", "no_capacity")
    assert bench.decode.of(request_id) == []


def test_refusal_keeps_its_headers_only_if_it_has_no_reason(bench: Bench) -> None:
    """By the reason in dynamic metadata Envoy distinguishes refusals of the service from its own errors."""
    _, response = bench.post(BODY, test_refuse="without-reason")

    assert response.status_code == 429
    assert error_of(response)["message"] == "The proxy gets too many requests. Try again later."
    assert response.headers["retry-after"] == "7"


def test_client_gets_a_json_503_if_the_decode_engine_refuses_connections(bench: Bench) -> None:
    """The error has the shape that client libraries can read, and does not reveal the address."""
    _, response = bench.post(BODY, test_decode_host="127.0.0.1:1")

    assert response.status_code == 503
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "upstream_failed")
    assert "127.0.0.1" not in error["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens?beta=true", "/v1/responses", "/generate"])
def test_error_of_envoy_has_the_shape_of_its_path(bench: Bench, path: str) -> None:
    """Clients of Anthropic's API read no other, and those of SGLang read the members beside ``error``."""
    response = bench.client.post(path, content=BODY, headers={"test-decode-host": "127.0.0.1:1"})
    body = response.json()
    message = body["error"].pop("message")

    assert response.status_code == 503
    assert response.headers.get_list("retry-after") == ["1"]
    assert message.startswith("The server did not answer: ")
    kind = {"type": "server_error", "param": None}
    assert body == (
        {"type": "error", "error": {"type": "overloaded_error"}}
        if path.startswith("/v1/messages")
        else {"error": {**kind, "code": "upstream_failed"}, "object": "error", "message": message, **kind, "code": 503}
    )


@pytest.mark.parametrize(
    ("status", "own", "seen"), [(503, None, ["1"]), (429, None, ["1"]), (503, "9", ["9"]), (500, None, [])]
)
def test_engine_error_of_overload_gets_retry_after(bench: Bench, status: int, own: str | None, seen: list[str]) -> None:
    """Engines do not send it, and client libraries wait by it. What an engine does send stays."""
    headers = {"test-one-server": "1", **({"test-retry-after": own} if own else {})}
    response = bench.client.post(f"/status/{status}", content=BODY, headers=headers)

    assert response.status_code == status
    assert response.headers.get_list("retry-after") == seen


def test_client_gets_a_json_400_for_malformed_http(bench: Bench) -> None:
    """The error has the shape of OpenAI errors, even though Envoy could not parse the request."""
    with socket.create_connection((bench.config.envoy.inference.host, bench.config.envoy.inference.port)) as client:
        client.settimeout(10)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n")
        answer = HTTPResponse(client)
        answer.begin()
        body = answer.read()

    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["code"] == "request_refused"


def test_client_gets_a_json_413_for_a_chunked_upload_above_the_limit(bench: Bench) -> None:
    """Envoy stops an upload of unknown length. In full duplex mode the service has to."""
    if bench.config.envoy.body_mode is BodyMode.FULL_DUPLEX_STREAMED:
        pytest.skip("Envoy does not hold the body in this mode")

    def chunks() -> Iterator[bytes]:
        for _ in range(36):
            yield b" " * (1 << 20)

    request_id, response = bench.post(chunks())

    assert response.status_code == 413
    assert error_of(response) == {
        "message": f"The request body is larger than {bench.config.envoy.max_body_bytes} bytes; send a smaller one.",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }
    assert bench.decode.of(request_id) == []


def test_access_log_has_the_decision_about_each_request(bench: Bench) -> None:
    """One line for each request has the endpoints and ranks of both legs, and each prefill leg has a line."""
    request_id, _ = bench.post(BODY)

    line = bench.log_line(request_id, "main")
    assert {key: line[key] for key in ("method", "path", "status", "response_code_details", "response_flags")} == {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "response_code_details": "via_upstream",
        "response_flags": "-",
    }
    assert {
        key: line[key] for key in ("model", "pool", "prefill_host", "prefill_rank", "decode_host", "decode_rank")
    } == {
        "model": "small",
        "pool": "small,tiny",
        "prefill_host": bench.prefill.address,
        "prefill_rank": 2,
        "decode_host": bench.decode.address,
        "decode_rank": 3,
    }
    assert line["bytes_received"] == len(BODY)
    assert line["duration_ms"] >= line["first_byte_ms"] >= 0
    assert line["reason"] is None
    assert bench.log_line(request_id, "prefill")["prefill_host"] == bench.prefill.address


@pytest.mark.parametrize("session_header", [None, "x-session"])
def test_a_client_forges_no_conversation_through_a_naked_listener(session_header: str | None) -> None:
    """The block takes the name of the conversation from the configured header only."""
    with run_bench(BodyMode.BUFFERED, naked=True, session_header=session_header) as bench:
        for own in ("", "mine"):
            request_id, response = bench.post(x_dp_session="of another", x_session=own)
            assert response.status_code == 200
            (seen,) = [each for each in bench.service.seen_headers if each.get("x-request-id") == request_id]
            assert seen.get(contract.SESSION, "") == (own if session_header else "")
            assert contract.SESSION not in bench.decode.one(request_id).headers
