"""A whole fleet on this machine: strict engines, the service and Envoy."""

import json
import ssl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from patience import wait_for

PREFILL_RANKS = 4
DECODE_RANKS = 2
PATIENCE = ("--timeout-bootstrap", "100000", "--timeout-waiting", "100000", "--timeout-heartbeat", "1000")
"""These timeouts must not shrink with the time scale, or an engine on a busy test machine counts as dead."""
FAST = ("--time-scale", "0.01", *PATIENCE)
"""A hundred times faster than a real engine: these tests check bodies, not times."""

ROUTING_FIELDS = {
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "data_parallel_rank",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "rid",
}
EVIL = {
    "routed_dp_rank": 99,
    "disagg_prefill_dp_rank": 99,
    "data_parallel_rank": 99,
    "bootstrap_host": "10.9.9.9",
    "bootstrap_port": 9,
    "bootstrap_room": 9,
}
"""Fields by which a client could try to control routing from its body."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The running engines, service and Envoy."""

    prefills: Sequence[EngineProcess]
    decodes: Sequence[EngineProcess]
    service: ServiceProcess
    envoy: EnvoyProcess
    client: httpx.Client
    version: tuple[int, ...]

    def forget(self) -> None:
        """Clear the request journals of the engines."""
        for engine in (*self.prefills, *self.decodes):
            engine.forget()

    def legs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Wait for the two legs of the one request since :meth:`forget`, prefill first."""
        return one(self.prefills), one(self.decodes)

    def received(self) -> list[dict[str, Any]]:
        """List every request that any engine has received since :meth:`forget`."""
        return [request for engine in (*self.prefills, *self.decodes) for request in engine.requests()]


class Remembers(Protocol):
    """An engine that keeps a journal of its requests."""

    def requests(self) -> list[dict[str, Any]]: ...


def one(engines: Sequence[Remembers]) -> dict[str, Any]:
    """Wait until the engines have one finished request between them, and return it."""

    def finished() -> list[dict[str, Any]]:
        requests = [request for engine in engines for request in engine.requests()]
        return [request for request in requests if request["outcome"] != "running"]

    (request,) = wait_for(finished)
    return request


def body_of(request: dict[str, Any]) -> dict[str, Any]:
    """Read the body of a received request, exactly as it arrived."""
    body: dict[str, Any] = json.loads(request["body"])
    return body


def start_engines(
    running: ExitStack, prefills: int, decodes: int, *flags: str, tls: ssl.SSLContext | None = None
) -> tuple[list[EngineProcess], list[EngineProcess]]:
    """Start prefill and decode engines, which end with *running*, and wait until all listen."""
    prefill = [EngineProcess("prefill", PREFILL_RANKS, *flags, tls=tls) for _ in range(prefills)]
    decode = [EngineProcess("decode", DECODE_RANKS, *flags, tls=tls) for _ in range(decodes)]
    for engine in (*prefill, *decode):
        running.push(engine)
        engine.start()
    for engine in (*prefill, *decode):
        engine.wait_until_listening()
    return prefill, decode


def pool_of(prefill: Sequence[EngineProcess], decode: Sequence[EngineProcess]) -> dict[str, Any]:
    """Give the configuration of a pool of these engines for all models."""
    return {
        "models": ["*"],
        "prefill": {"endpoints": [engine.url for engine in prefill]},
        "decode": {"endpoints": [engine.url for engine in decode]},
    }


@contextmanager
def run_stack(
    version: str = "0.5.23",
    *,
    prefills: int = 1,
    decodes: int = 1,
    options: Sequence[str] = (),
    tls: ssl.SSLContext | None = None,
    **sections: Any,
) -> Iterator[Stack]:
    """Run a disaggregated fleet of one release; *sections* override the configuration, or that of its pool.

    At the end no reservation may be left.
    """
    flags = ("--sglang-version", version, "--dp-attention", *FAST, *options)
    of_pool: dict[str, Any] = {key: sections.pop(key) for key in ("policy", "api_key") if key in sections}
    with ExitStack() as running:
        prefill, decode = start_engines(running, prefills, decodes, *flags, tls=tls)
        pool = pool_of(prefill, decode) | of_pool
        service = running.enter_context(ServiceProcess(write_config([pool], **sections)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url, timeout=60))
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Stack(prefill, decode, service, envoy, client, tuple(map(int, version.split("."))))
        if service.is_running:
            service.wait_until_idle()
