"""Two engines of each role, the service and Envoy, and clients that report the result of each request."""

import copy
import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final

import httpx
import yaml
from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap
from envoy_data_plane.envoy.config.cluster.v3 import Cluster, ClusterDiscoveryType
from envoy_data_plane.envoy.config.endpoint.v3 import LocalityLbEndpoints

from dp_extproc.config import Config
from dp_extproc.envoy_config import build_bootstrap, render_yaml
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import ext_proc, load_gateway
from e2e.stack import FAST
from patience import wait_for

TOKENS: Final = 5
"""Output tokens of each request."""
PATIENCE: Final = 20.0
"""Seconds that a client waits for the next byte."""
_MESSAGE_TIMEOUT: Final = " message_timeout: 20s"

BODIES: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": TOKENS},
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": TOKENS}},
}


class Form(Enum):
    """Who sends the prefill leg, and which gateway is in front.

    The value has the modes of the bodies of requests and responses, if that is another gateway.
    """

    MIRRORED = None
    """The bundled Envoy mirrors it."""
    SERVICE = ()
    """The service sends it, and the bundled Envoy sends the decode leg."""
    PICKER = ("FULL_DUPLEX_STREAMED", "NONE")
    """Another gateway sends the decode leg, as in the example."""
    PICKER_DUPLEX = ("FULL_DUPLEX_STREAMED", "FULL_DUPLEX_STREAMED")
    PICKER_BUFFERED = ("BUFFERED", "NONE")

    @property
    def is_picker(self) -> bool:
        return bool(self.value)


@dataclass(frozen=True)
class Outcome:
    """The result that a client got."""

    status: int | None
    """None if no response came while the client waited."""
    text: str
    complete: bool
    """Whether the response came to its end, with every token."""
    reason: str | None = None
    """Reason of an error that does not come from the engine: the service's or Envoy's."""
    error: httpx.TransportError | None = None
    """The exception that broke the connection, or made the client stop waiting."""

    @property
    def is_marked_incomplete(self) -> bool:
        """Whether the client got the event that marks the response as incomplete."""
        return self.text.endswith("\n\n") and '"stream_cut"' in self.text.rpartition("event: error\n")[2]

    @property
    def is_lost(self) -> bool:
        """Whether the client has no part of the response."""
        return not self.complete and not (
            self.status == 200 and self.text and not isinstance(self.error, httpx.TimeoutException)
        )

    def __str__(self) -> str:
        if self.status is None:
            return f"nothing: {self.error!r}"
        if self.status == 200:
            if self.complete:
                return "answer"
            return "part of the answer, and an error event" if self.is_marked_incomplete else "part of the answer"
        return f"{self.status} {self.reason or 'of the engine'}"


def ask(
    client: httpx.Client,
    path: str,
    *,
    stream: bool,
    patience: float = PATIENCE,
    on_first: Callable[[], object] | None = None,
    **more: Any,
) -> Outcome:
    """Send a request, and return its result.

    Args:
        client: Whose connections to use.
        path: Path of the request.
        stream: Whether it asks for a stream.
        patience: Seconds to wait for each byte.
        on_first: Called when the first bytes of the response have arrived.
        more: Further fields of the body.
    """
    text, status, reason, complete, broken = b"", None, None, False, None
    try:
        body = {**BODIES[path], "stream": stream, **more}
        with client.stream("POST", path, json=body, timeout=patience) as answer:
            status, reason = answer.status_code, answer.headers.get("x-dp-extproc-reason")
            for chunk in answer.iter_bytes():
                if not text and on_first is not None:
                    on_first()
                text += chunk
    except httpx.TransportError as error:
        broken = error
    else:
        complete = status == 200 and _is_complete(text, stream=stream)
        reason = reason or (_reason_of_envoy(text) if status != 200 else None)
    return Outcome(status, text.decode(errors="replace"), complete, reason, broken)


@contextmanager
def asking(fleet: "Fleet", path: str) -> Iterator[socket.socket]:
    """Request a stream; the caller decides whether to read any of it."""
    body = json.dumps({**BODIES[path], "stream": True}).encode()
    host, port = fleet.envoy.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(head.encode() + body)
        yield client


def _is_complete(text: bytes, *, stream: bool) -> bool:
    if stream:
        return text.endswith(b"data: [DONE]\n\n") and b'"length"' in text
    return b'"length"' in text and text.endswith(b"}")


def _reason_of_envoy(text: bytes) -> str | None:
    """Read the code of an error; SGLang's own are numbers, and those of another gateway are no JSON."""
    if text.startswith((b"upstream connect error", b"no healthy upstream")) or not text:
        return "of the gateway"
    try:
        code = json.loads(text)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        return None
    return code if isinstance(code, str) else None


@dataclass(frozen=True)
class Fleet:
    """The running engines, services, Envoy and client."""

    prefills: Sequence[EngineProcess]
    decodes: Sequence[EngineProcess]
    service: ServiceProcess
    envoy: EnvoyProcess
    client: httpx.Client
    threads: ThreadPoolExecutor
    others: Sequence[ServiceProcess] = ()
    """Further replicas of the service."""

    @property
    def engines(self) -> Sequence[EngineProcess]:
        return (*self.prefills, *self.decodes)

    def forget(self) -> None:
        """Clear the request journals of the engines."""
        for engine in self.engines:
            engine.forget()

    def recover(self) -> None:
        """Remove the faults of all engines, and wait until the service has read them."""
        for engine in self.engines:
            engine.heal()
        self.wait_until_fresh()

    def recover_all_but(self, failing: EngineProcess) -> None:
        """Remove the faults of all engines but one."""
        for engine in self.engines:
            if engine is not failing:
                engine.heal()

    def restart_service(self) -> None:
        """Start the service again."""
        self.service.start()
        self.service.wait_until_listening()
        self.wait_until_fresh()

    def wait_until_fresh(self) -> None:
        """Wait until every endpoint is fresh and has no failure."""
        wait_for(lambda: all(each["state"] == "fresh" and not each["failure"] for each in self.endpoints()))

    def settle(self) -> None:
        """Wait until no engine has work, and no reservation is left."""
        wait_for(lambda: not self.running())
        wait_for(lambda: not self.reserved())

    def running(self) -> list[tuple[str, str]]:
        """List the legs that engines still run."""
        return [
            (engine.role, record["path"])
            for engine in self.engines
            if engine.is_running
            for record in engine.requests()
            if record["outcome"] == "running"
        ]

    def reserved(self) -> list[dict[str, Any]]:
        """List the ranks' reservations that are not zero."""
        reserved = [rank["reserved"] for each in self.endpoints() for rank in each["ranks"]]
        return [each for each in reserved if each["requests"] or each["tokens"]]

    def endpoints(self) -> list[dict[str, Any]]:
        """List the endpoints as the service reports them."""
        found: list[dict[str, Any]] = self.service.loads()["endpoints"]
        return found

    def stat(self, name: str) -> int:
        """Read a number of Envoy's statistics; 0 if Envoy has not counted it yet."""
        page = loopback.CLIENT.get(f"{self.envoy.admin_url}/stats", params={"filter": f"^{re.escape(name)}$"})
        return int(page.raise_for_status().text.rpartition(":")[2] or 0)


@contextmanager
def run_fleet(
    options: Sequence[str] = FAST,
    *,
    message_timeout: str | None = None,
    replicas: int = 1,
    form: Form = Form.MIRRORED,
    of_pool: Mapping[str, Any] = MappingProxyType({}),
    in_front: Callable[[Config], EnvoyProcess] | None = None,
    **sections: Any,
) -> Iterator[Fleet]:
    """Run a fleet.

    Args:
        options: Options of the engines.
        form: Who sends the prefill leg, and which gateway is in front.
        message_timeout: How long Envoy waits for a message of the service, if that is to be less than usual.
        replicas: Number of services behind one Envoy that finds them by a name.
        of_pool: Overrides the configuration of the pool.
        in_front: Makes an Envoy with another configuration than the printed bootstrap.
        sections: Override the configuration.
    """
    with ExitStack() as running:
        engines = [
            EngineProcess(role, 2, "--dp-attention", *options) for role in ("prefill", "prefill", "decode", "decode")
        ]
        for engine in engines:
            running.push(engine)
            engine.start()
        for engine in engines:
            engine.wait_until_listening()
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [engine.url for engine in engines[:2]]},
            "decode": {"endpoints": [engine.url for engine in engines[2:]]},
            **of_pool,
        }
        services = [
            running.enter_context(ServiceProcess(write_config([pool], **copy.deepcopy(sections), **_KEYS[form])))
            for _ in range(replicas)
        ]
        service = services[0]
        if form.is_picker:
            bootstrap = _build_gateway(service.config, [engine.port for engine in engines[2:]], *form.value)
        elif replicas == 1:
            bootstrap = render_yaml(build_bootstrap(service.config))
        else:
            bootstrap = render_yaml(_build_for_several([each.config for each in services]))
        assert _MESSAGE_TIMEOUT in bootstrap
        if message_timeout is not None:
            bootstrap = bootstrap.replace(_MESSAGE_TIMEOUT, f" message_timeout: {message_timeout}")
        envoy = running.enter_context(
            in_front(service.config) if in_front else EnvoyProcess(service.config, bootstrap=bootstrap)
        )
        client = running.enter_context(loopback.client(envoy.url))
        threads = running.enter_context(ThreadPoolExecutor(256))
        fleet = Fleet(engines[:2], engines[2:], service, envoy, client, threads, services[1:])
        fleet.wait_until_fresh()
        for each in services:
            each.wait_until_ready()
        yield fleet


_KEYS: Final[dict[Form, dict[str, Any]]] = {
    **{form: {"protocol": "endpoint_picker", "picker": {"hold": "5s"}} for form in Form},
    Form.MIRRORED: {},
    Form.SERVICE: {"prefill_leg": "service"},
}
"""The keys of the configuration that make a form."""


def _build_gateway(config: Config, decodes: Sequence[int], request: str, response: str) -> str:
    """Build the example of a gateway for prefill and decode, with the modes of its bodies."""
    gateway = load_gateway(config, decodes, "endpoint-picker-pd.yaml")
    ext_proc(gateway)["processing_mode"].update(request_body_mode=request, response_body_mode=response)
    return yaml.safe_dump(gateway)


def _build_for_several(configs: Sequence[Config]) -> Bootstrap:
    """Build Envoy's configuration as if the name of the service had been resolved to these addresses."""
    first = configs[0]
    named = first.model_copy(update={"envoy": first.envoy.model_copy(update={"service": "dp-extproc.test:9002"})})
    bootstrap = build_bootstrap(named)
    cluster = _cluster_of_the_service(bootstrap)
    endpoints = [_cluster_of_the_service(build_bootstrap(each)).load_assignment for each in configs]
    assert cluster.load_assignment is not None
    cluster.type = ClusterDiscoveryType.STATIC
    cluster.load_assignment.endpoints = [
        LocalityLbEndpoints(
            lb_endpoints=[each for found in endpoints if found for each in found.endpoints[0].lb_endpoints]
        )
    ]
    return bootstrap


def _cluster_of_the_service(bootstrap: Bootstrap) -> Cluster:
    assert bootstrap.static_resources is not None
    return next(each for each in bootstrap.static_resources.clusters if each.name == "extproc")
