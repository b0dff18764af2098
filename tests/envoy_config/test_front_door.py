"""The options of the front door, each driven through a real Envoy by a real client."""

import re
import socket
import ssl
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from certificates import Authority
from dp_extproc.config import BodyMode
from dp_extproc.lab.testbed.ports import free_port
from envoy_config.collector import Collector, run_collector
from envoy_config.harness import BODY, Bench, run_bench
from patience import wait_for

ORIGIN = "https://chat.test"
TRACE = "0af7651916cd43dd8448eb211c80319c"


@dataclass(frozen=True)
class Equipped:
    """An Envoy with TLS for clients, CORS, tracing and access logs to collectors."""

    bench: Bench
    collector: Collector
    authority: Authority
    files: dict[str, str]

    def client(self, *, with_certificate: bool = True, http2: bool = True) -> httpx.Client:
        context = ssl.create_default_context(cafile=self.authority.ca)
        context.check_hostname = False
        if with_certificate:
            context.load_cert_chain(self.files["cert"], self.files["key"])
        return httpx.Client(base_url=self.bench.envoy.url, verify=context, http2=http2, trust_env=False, timeout=30)


@pytest.fixture(scope="module")
def equipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Equipped]:
    root = tmp_path_factory.mktemp("front-door")
    authority = Authority.found(root)
    files = authority.issue("front")
    with run_collector() as collector:
        settings: dict[str, Any] = {
            "tls": {**files, "client_ca": authority.ca},
            "secrets": str(root),
            "cors": {"allow_origins": [ORIGIN], "expose_headers": ["x-request-id"], "allow_credentials": True},
            "tracing": {"collector": collector.address, "service_name": "gateway"},
            "access_log": {"grpc": collector.address, "otel": collector.address, "file": str(root / "access.log")},
        }
        with run_bench(BodyMode.BUFFERED, **settings) as bench:
            yield Equipped(bench, collector, authority, files)


def send(client: httpx.Client, **headers: str) -> tuple[str, httpx.Response]:
    request_id = str(uuid.uuid4())
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return request_id, client.post("/v1/completions", content=BODY, headers={"x-request-id": request_id, **named})


def test_envoy_accepts_every_option_without_a_deprecated_field(equipped: Equipped) -> None:
    """Envoy logs a warning about each deprecated field at its start."""
    assert "deprecated" not in equipped.bench.envoy.log().lower()


@pytest.mark.parametrize(("http2", "version"), [(True, "HTTP/2"), (False, "HTTP/1.1")])
def test_clients_use_tls_with_both_versions_of_http(equipped: Equipped, http2: bool, version: str) -> None:
    """ALPN offers both, and a request reaches both engines."""
    with equipped.client(http2=http2) as client:
        request_id, response = send(client)

    assert (response.status_code, response.http_version) == (200, version)
    assert equipped.bench.prefill.one(request_id)


def test_a_client_without_a_certificate_is_refused(equipped: Equipped) -> None:
    """With ``client_ca`` no request of it is read."""
    with equipped.client(with_certificate=False) as client, pytest.raises(httpx.TransportError):
        send(client)


def test_a_preflight_request_is_answered_by_envoy(equipped: Equipped) -> None:
    """Only named origins may send requests, although engines allow every one, as SGLang and vLLM do.

    The answers to them have the headers that browsers compare.
    """
    allow = {"access-control-allow-origin": "*", "access-control-allow-credentials": "true"}
    equipped.bench.decode.headers.update(allow)
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    before = len(equipped.bench.decode.received)
    with equipped.client() as client:
        allowed = client.options("/v1/completions", headers={"origin": ORIGIN, **ask})
        refused = client.options("/v1/completions", headers={"origin": "https://other.test", **ask})
        assert len(equipped.bench.decode.received) == before
        _, answer = send(client, origin=ORIGIN)
        _, other = send(client, origin="https://other.test")
    equipped.bench.decode.headers.clear()

    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert allowed.headers["access-control-allow-headers"] == "authorization"
    assert allowed.headers["access-control-max-age"] == "600"
    assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN]
    assert answer.headers["access-control-expose-headers"] == "x-request-id"
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "access-control-allow-origin" not in refused.headers
    assert not [name for name in other.headers if name.startswith("access-control-")]


def test_one_trace_has_the_request_and_its_prefill_leg(equipped: Equipped) -> None:
    """The spans of all hops belong to the client's trace, and so does the context that each engine gets."""
    client_span = "b7ad6b7169203331"
    with equipped.client() as client:
        request_id, _ = send(client, traceparent=f"00-{TRACE}-{client_span}-01")
    collector = equipped.collector
    wait_for(lambda: collector.hops(TRACE).keys() == {"front_door", "main", "prefill"}, 20)
    hops = collector.hops(TRACE)
    # Envoy has a span of its own for the mirroring in between, and exports spans every 5 s.
    wait_for(lambda: client_span in collector.ancestors(hops["prefill"]), 20)

    assert hops["front_door"].parent == client_span
    assert hops["main"].parent == hops["front_door"].id
    assert collector.ancestors(hops["prefill"]) >= {hops["main"].id, hops["front_door"].id}
    assert hops["main"].tags["decode_host"] == equipped.bench.decode.address
    for engine in (equipped.bench.decode, equipped.bench.prefill):
        assert re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", engine.one(request_id).headers["traceparent"])


def test_an_unsampled_trace_of_a_client_stays_so(equipped: Equipped) -> None:
    """The client's decision counts, and its context is passed on."""
    trace = uuid.uuid4().hex
    with equipped.client() as client:
        request_id, _ = send(client, traceparent=f"00-{trace}-b7ad6b7169203331-00")
        _, later = send(client)

    assert later.status_code == 200
    assert equipped.bench.decode.one(request_id).headers["traceparent"].startswith(f"00-{trace}-")
    wait_for(lambda: equipped.collector.records)
    assert equipped.collector.hops(trace) == {}


def test_access_logs_reach_every_target(equipped: Equipped) -> None:
    """Both legs are in each log, with their decision."""
    with equipped.client() as client:
        request_id, _ = send(client)
    lines = {each["leg"]: each for each in equipped.bench.envoy.wait_for_access_log(request_id, 2)}

    def records() -> dict[str, dict[str, str]]:
        return {each["leg"]: each for each in equipped.collector.records if each["request_id"] == request_id}

    def entries() -> dict[str, Any]:
        found = [each for each in equipped.collector.entries if each.request.request_id == request_id]
        return {each.common_properties.custom_tags["leg"]: each for each in found}

    wait_for(lambda: len(records()) == len(entries()) == 2)
    assert lines.keys() == records().keys() == entries().keys() == {"main", "prefill"}
    assert records()["main"]["decode_host"] == lines["main"]["decode_host"] == equipped.bench.decode.address
    fields = entries()["main"].common_properties.metadata.filter_metadata["dp_extproc"].fields
    assert fields["decode_host"].string_value == equipped.bench.decode.address
    assert request_id in (equipped.authority.directory / "access.log").read_text(encoding="utf-8")


def test_a_renewed_certificate_is_used_without_a_restart(equipped: Equipped) -> None:
    """The listener is not replaced, so open streams go on."""
    address = equipped.bench.config.envoy.inference

    def shown() -> str:
        return ssl.get_server_certificate((address.host, address.port))

    before = shown()
    equipped.authority.issue("front")
    wait_for(lambda: shown() != before)


def test_old_clients_are_served_at_an_address_of_both_families() -> None:
    """A request of HTTP/1.0 without a host arrives by IPv4 at a listener on ``[::]``; its answer ends by a close."""
    port = free_port("::")
    with (
        run_bench(BodyMode.BUFFERED, inference=f"[::]:{port}") as bench,
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.0 200 OK")
    assert b'"answered_by":"decode"' in answer
    assert bench.decode.received[0].headers["host"] == "dp-extproc"


def test_old_clients_and_web_pages_can_be_refused() -> None:
    """Each of the defaults can be switched off."""
    port = free_port("::")
    settings: dict[str, Any] = {"inference": f"[::]:{port}", "ipv4_compat": False, "accept_http_10": False}
    with run_bench(BodyMode.BUFFERED, **settings, cors=None):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)
        with socket.create_connection(("::1", port), timeout=10) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            old = connection.recv(65536)
        ask = {"origin": ORIGIN, "access-control-request-method": "POST", "x-request-id": str(uuid.uuid4())}
        page = httpx.options(f"http://[::1]:{port}/v1/completions", headers=ask)

    assert old.startswith(b"HTTP/1.1 426")
    assert "access-control-allow-origin" not in page.headers
