"""Requests through a real Envoy with the printed configuration, in both body modes."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from dp_extproc import contract
from dp_extproc.config import BodyMode
from envoy_config.harness import BODY, Bench, error_of
from envoy_config.recording_engine import RecordingEngine
from envoy_config.scripted_service import DECODE_PREFIX, LEG_TOKEN, PREFILL_PREFIX

OWN_HEADERS = ("x-dp-", "x-envoy-", "x-override-", "x-data-parallel-rank")


def test_each_leg_gets_its_own_body(bench: Bench) -> None:
    """Decode gets the body of the service, prefill the same with its prefix; the client hears decode."""
    request_id, response = bench.post(BODY)

    assert response.json()["answered_by"] == "decode"
    assert bench.decode.one(request_id).body == DECODE_PREFIX + BODY[1:]
    assert bench.prefill.one(request_id).body == PREFILL_PREFIX + BODY[1:]


@pytest.mark.parametrize("leg", ["decode", "prefill"])
def test_no_header_of_the_router_or_of_envoy_reaches_an_engine(bench: Bench, leg: str) -> None:
    """The x-dp-* headers choose the hosts and are gone behind them, as is what Envoy adds."""
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
def test_a_clients_routing_header_is_removed_before_the_service_sees_it(bench: Bench, header: str) -> None:
    """A client cannot name hosts, ranks or Envoy options; its request is placed as any other."""
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


def test_one_server_gets_an_unmirrored_request(bench: Bench) -> None:
    """Without a prefill host there is one leg, with the body as the service left it."""
    request_id, response = bench.post(BODY, test_one_server="1")

    assert response.status_code == 200
    assert bench.decode.one(request_id).body == BODY
    assert bench.log_line(request_id, "main")["prefill_host"] is None
    assert bench.prefill.of(request_id) == []


def test_a_get_goes_to_one_server(bench: Bench) -> None:
    """A request without a body is routed by its headers alone."""
    response = bench.client.get("/health")

    assert response.json() == {"answered_by": "decode", "bytes": 0}


def test_a_chunked_upload_is_rewritten_on_both_legs(bench: Bench) -> None:
    """A client need not know the length of what it sends."""

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


def test_32_mib_pass_both_legs(bench: Bench) -> None:
    """The buffers of all hops hold a large body, which arrives byte for byte."""
    body = b'{"prompt":"' + bytes(range(32, 34)) * (16 << 20) + b'"}'

    request_id, response = bench.post(body)

    assert response.status_code == 200
    assert bench.decode.one(request_id).body == DECODE_PREFIX + body[1:]
    assert bench.prefill.one(request_id).body == PREFILL_PREFIX + body[1:]


def test_the_prefix_of_a_large_batch_fits_into_its_header(bench: Bench) -> None:
    """900 kB of prefill fields pass the internal listeners."""
    request_id, response = bench.post(BODY, test_longer_prefix="900000")

    assert response.status_code == 200
    assert len(bench.prefill.one(request_id).body) == len(PREFILL_PREFIX) + 900_000 + len(BODY) - 1


@pytest.mark.parametrize("length", ["", "x", "-1", "1.5", "nan", "1000000"])
def test_a_prefill_leg_without_a_usable_prefix_is_not_forwarded(bench: Bench, length: str) -> None:
    """A body with the decode leg's fields must not reach a prefill server."""
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
def test_the_owner_hears_the_status_of_its_prefill_leg(
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


def test_a_refusal_of_the_service_passes_untouched(bench: Bench) -> None:
    """Status, body and headers of an ImmediateResponse with a reason are the service's own."""
    request_id, response = bench.post(BODY, test_refuse="with-reason")

    assert response.status_code == 429
    assert response.json() == {"error": {"message": "full", "code": "of the service"}}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["retry-after"] == "7"
    line = bench.log_line(request_id, "main")
    assert (line["reason"], line["response_code_details"]) == ("no_capacity", "no_capacity")
    assert bench.decode.of(request_id) == []


def test_a_refusal_without_a_reason_keeps_its_headers_only(bench: Bench) -> None:
    """The reason in dynamic metadata is what tells the service's refusals from Envoy's own errors."""
    _, response = bench.post(BODY, test_refuse="without-reason")

    assert response.status_code == 429
    assert error_of(response)["message"] == "The proxy refused the request: no_capacity"
    assert response.headers["retry-after"] == "7"


def test_a_decode_server_that_refuses_connections_gives_a_json_503(bench: Bench) -> None:
    """The client learns in the shape it can read that there was no answer."""
    _, response = bench.post(BODY, test_decode_host="127.0.0.1:1")

    assert response.status_code == 503
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", "upstream_failed")
    assert "127.0.0.1" not in error["message"]


def test_a_protocol_error_gives_a_json_400(bench: Bench) -> None:
    """Even what Envoy cannot parse is answered in the shape of OpenAI errors."""
    with socket.create_connection((bench.config.envoy.inference.host, bench.config.envoy.inference.port)) as client:
        client.settimeout(10)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n")
        answer = HTTPResponse(client)
        answer.begin()
        body = answer.read()

    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["code"] == "request_refused"


def test_a_chunked_upload_above_the_limit_gives_a_json_413(bench: Bench) -> None:
    """Envoy stops an upload that declares no length; in duplex mode the service has to."""
    if bench.config.envoy.body_mode is BodyMode.FULL_DUPLEX_STREAMED:
        pytest.skip("Envoy does not hold the body in this mode")

    def chunks() -> Iterator[bytes]:
        for _ in range(36):
            yield b" " * (1 << 20)

    request_id, response = bench.post(chunks())

    assert response.status_code == 413
    assert error_of(response) == {
        "message": f"The request body is larger than {bench.config.envoy.max_body_bytes} bytes.",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }
    assert bench.decode.of(request_id) == []


def test_the_access_log_shows_where_a_request_was_placed(bench: Bench) -> None:
    """One line per request, with hosts and ranks of both legs, and one per prefill leg."""
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
