"""A fleet behind a gateway that another control plane configures, and a neighbour: another host on the same gateway."""

import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Protocol, Self

import httpx

from dp_extproc import contract
from dp_extproc.config import Config
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from interop.report import Report
from patience import wait_for

RANKS: Final = 2
"""DP ranks of each engine."""
TIMES: Final = ("--time-scale", "0.01", "--timeout-bootstrap", "100000", "--timeout-waiting", "100000")
"""A hundred times faster than a real engine, but for timeouts that a busy machine must not meet."""
MAX_BODY_BYTES: Final = 33 << 20
SETTINGS: Final[Mapping[str, Any]] = {
    "retry": {"attempts": 3, "budget": 1.0},
    # Requests have to meet every fault, so no endpoint may be ejected; ejection has its own tests.
    "outlier_detection": {"consecutive_failures": 1000},
}
"""Sections of the configuration that the scenarios need."""


class Gateway(Protocol):
    """A running gateway; its control plane has the printed resources."""

    url: str
    admin_url: str
    """Of its Envoy."""


@dataclass(frozen=True, slots=True)
class Pods:
    """Engines in pods of a cluster, which the service finds by itself."""

    prefill: Sequence[str]
    """Addresses of the two prefill engines."""
    decode: Sequence[str]
    """Addresses of the two decode engines."""
    port: int
    sources: Mapping[str, Any]
    """``prefill`` and ``decode`` of the pool in the configuration."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Strict engines, two of each role, and the service."""

    prefills: Sequence[EngineProcess]
    decodes: Sequence[EngineProcess]
    service: ServiceProcess

    @property
    def engines(self) -> Sequence[EngineProcess]:
        return (*self.prefills, *self.decodes)

    @property
    def config(self) -> Config:
        return self.service.config

    def forget(self) -> None:
        """Clear the request journals of the engines."""
        for engine in self.engines:
            engine.forget()

    def recover(self) -> None:
        """Start engines that have ended, remove all faults, and wait until the service has read that."""
        for engine in self.engines:
            if not engine.is_running:
                engine.start()
                engine.wait_until_listening()
            engine.heal()
        wait_for(lambda: all(each["state"] == "fresh" and not each["failure"] for each in self.endpoints()), 30)

    def endpoints(self) -> list[dict[str, Any]]:
        """List the endpoints as the service reports them."""
        found: list[dict[str, Any]] = self.service.loads()["endpoints"]
        return found

    def settle(self) -> None:
        """Wait until no engine has work, and no reservation is left."""
        wait_for(lambda: not self.running())
        self.service.wait_until_idle()

    def running(self) -> list[dict[str, Any]]:
        """List the legs that engines still run."""
        return [leg for engine in self.engines if engine.is_running for leg in running_on(engine)]


def running_on(engine: EngineProcess) -> list[dict[str, Any]]:
    """List the legs that an engine runs."""
    return [leg for leg in engine.requests() if leg["outcome"] == "running"]


@contextmanager
def run_fleet(
    engine_options: Sequence[str] = (),
    client_tls: ssl.SSLContext | None = None,
    pods: Pods | None = None,
    **sections: Any,
) -> Iterator[Fleet]:
    """Run two engines of each role and the service.

    Args:
        engine_options: Further options of the engines.
        client_tls: For the API ports of the engines, if the options make them serve TLS.
        pods: Where the engines run. Without it, they have free ports of loopback, and the configuration lists them.
        sections: Override those of the configuration.
    """
    with ExitStack() as running:
        options = ("--dp-attention", *TIMES, *engine_options)
        roles = ("prefill", "prefill", "decode", "decode")
        hosts = ["127.0.0.1"] * len(roles) if pods is None else [*pods.prefill, *pods.decode]
        port = None if pods is None else pods.port
        engines = [
            EngineProcess(role, RANKS, *options, host=host, port=port, tls=client_tls)
            for role, host in zip(roles, hosts, strict=True)
        ]
        for engine in engines:
            running.push(engine)
            engine.start()
        for engine in engines:
            engine.wait_until_listening()
        prefills, decodes = engines[:2], engines[2:]
        listed = {
            "prefill": {"endpoints": [engine.url for engine in prefills]},
            "decode": {"endpoints": [engine.url for engine in decodes]},
        }
        pool = {"models": ["*"], **(listed if pods is None else pods.sources)}
        envoy = {"max_body_bytes": MAX_BODY_BYTES, **sections.pop("envoy", {})}
        content = write_config([pool], **{**SETTINGS, **sections, "envoy": envoy})
        service = running.enter_context(ServiceProcess(content))
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Fleet(prefills, decodes, service)
        if service.is_running:
            service.wait_until_idle()


class Neighbour:
    """Another team's service on the same gateway: it answers with the headers that it received; a context manager."""

    def __init__(self) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
        self.port = self._http.server_port

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


_SLOWLY: Final = "/slow/"


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer()

    def do_GET(self) -> None:
        if self.path.startswith(_SLOWLY):
            self._stream(float(self.path.removeprefix(_SLOWLY)))
        else:
            self._answer()

    def _stream(self, seconds: float) -> None:
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nbegun\r\n")
        time.sleep(seconds)
        self.wfile.write(b"5\r\nended\r\n0\r\n\r\n")

    def _answer(self) -> None:
        body = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header(contract.RETRY, "of the neighbour")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet; the transcript has its own lines."""


@dataclass(frozen=True, slots=True)
class Site:
    """What each scenario gets."""

    fleet: Fleet
    gateway: Gateway
    client: httpx.Client
    """Sends to our host."""
    neighbour: httpx.Client
    """Sends to the host of another team on the same gateway."""
    threads: ThreadPoolExecutor
    report: Report
    gateway_headers: AbstractSet[str] = frozenset()
    """Names of the headers that the gateway writes into requests, or leaves there."""

    def stream_of_neighbour(self, seconds: float, on_first: Callable[[], object]) -> str:
        """Read a stream of the neighbour that takes so many seconds, and describe how it ended."""
        text = ""
        try:
            with self.neighbour.stream("GET", f"{_SLOWLY}{seconds}") as answer:
                for chunk in answer.iter_text():
                    if chunk and not text:
                        on_first()
                    text += chunk
        except httpx.TransportError as error:
            return f"cut ({type(error).__name__})"
        return "complete" if text == "begunended" else "cut"

    def count(self, pattern: str) -> int:
        """Add up the statistics of the gateway's Envoy whose names match a pattern."""
        page = loopback.CLIENT.get(f"{self.gateway.admin_url}/stats", params={"filter": pattern}).raise_for_status()
        return sum(int(value) for value in re.findall(r": (\d+)$", page.text, re.MULTILINE))


@contextmanager
def open_site(
    fleet: Fleet,
    gateway: Gateway,
    host: str,
    neighbour: str,
    report: Report,
    *,
    gateway_headers: AbstractSet[str] = frozenset(),
) -> Iterator[Site]:
    """Make the clients of both hosts."""
    with (
        loopback.client(gateway.url, timeout=60) as client,
        loopback.client(gateway.url, timeout=60) as other,
        ThreadPoolExecutor(64) as threads,
    ):
        client.headers["host"], other.headers["host"] = host, neighbour
        yield Site(fleet, gateway, client, other, threads, report, gateway_headers)
