"""The processes around one Envoy with a printed configuration, and helpers that read its responses."""

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx
import yaml

from dp_extproc import contract
from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_config import build_bootstrap, render_yaml
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from envoy_config.recording_engine import RecordingEngine, run_engine
from envoy_config.scripted_service import ScriptedService, run_service
from patience import wait_for

MAX_BODY_BYTES = 33 << 20
BODY = b'{"model":"small","prompt":"\xc3\xa9"}'


@dataclass(frozen=True, slots=True)
class Bench:
    """One Envoy, the scripted service and two recording engines."""

    config: Config
    envoy: EnvoyProcess
    service: ScriptedService
    prefill: RecordingEngine
    decode: RecordingEngine
    client: httpx.Client

    def post(self, body: bytes | Iterable[bytes] = b'{"model":"small"}', **headers: str) -> tuple[str, httpx.Response]:
        """Send *body* with a new request id. Underscores in header names stand for hyphens."""
        request_id = str(uuid.uuid4())
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = self.client.post("/v1/completions", content=body, headers={"x-request-id": request_id, **named})
        return request_id, response

    def log_line(self, request_id: str, leg: str) -> dict[str, Any]:
        """Wait until the access log has the line of a leg of a request, and return it. Either leg may be first."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.envoy.access_log() if (line["request_id"], line["leg"]) == (request_id, leg)]

        return wait_for(found)[0]


_WORKERS: Final[dict[str, Any]] = {"models": ["*"], "workers": {"endpoints": ["http://127.0.0.1:1"]}}
POOLS: Final[dict[BodyMode, dict[str, Any]]] = {
    BodyMode.BUFFERED: _WORKERS,
    BodyMode.FULL_DUPLEX_STREAMED: _WORKERS,
    BodyMode.NONE: {
        "models": ["*"],
        "routing_fields": "headers",
        "prefill": {"endpoints": ["http://127.0.0.1:1"]},
        "decode": {"endpoints": ["http://127.0.0.1:2"]},
        "policy": {"affinity": {"prefixes": False}},
    },
}
"""A pool that is valid in each body mode. Envoy's configuration names no engine."""


def make_config(body_mode: BodyMode, ports: list[int], **envoy: Any) -> Config:
    inference, admin, grpc_port = ports
    return Config.model_validate(
        {
            "listen": {"grpc": f"127.0.0.1:{grpc_port}"},
            "envoy": {
                "inference": f"127.0.0.1:{inference}",
                "admin": f"127.0.0.1:{admin}",
                "max_body_bytes": MAX_BODY_BYTES,
                "body_mode": body_mode,
                **envoy,
            },
            "pools": [POOLS[body_mode]],
        }
    )


def scripted_bootstrap(config: Config, *, naked: bool = False) -> str:
    """Print a bootstrap that also forwards headers of the script and untrusted headers to the service.

    A *naked* front door removes no headers of clients.
    """
    bootstrap = yaml.safe_load(render_yaml(build_bootstrap(config)))
    if naked:
        front_door = bootstrap["static_resources"]["listeners"][0]
        del front_door["filter_chains"][0]["filters"][-1]["typed_config"]["early_header_mutation_extensions"]
    patterns = _find(bootstrap, "forward_rules")["allowed_headers"]["patterns"]
    patterns.append({"exact": "x-request-id"})
    patterns.extend({"prefix": prefix} for prefix in ("test-", *contract.UNTRUSTED_PREFIXES))
    patterns.extend({"exact": name} for name in contract.UNTRUSTED_NAMES)
    return yaml.safe_dump(bootstrap, sort_keys=False)


def _find(tree: Any, key: str) -> Any:
    """Return the value of the first *key* anywhere in a tree of mappings and lists."""
    if isinstance(tree, dict) and key in tree:
        return tree[key]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return next((found for child in children if (found := _find(child, key)) is not None), None)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response in the shape of OpenAI errors."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


@contextmanager
def run_bench(body_mode: BodyMode, *, naked: bool = False, **settings: Any) -> Iterator[Bench]:
    """Run an Envoy with these settings in front of a scripted service and two recording engines.

    A *naked* front door removes no headers of clients.
    """
    ports = free_ports(3)
    config = make_config(body_mode, ports, **settings)
    with (
        run_engine("prefill") as prefill,
        run_engine("decode") as decode,
        run_service(prefill.address, decode.address, ports[2]) as service,
        EnvoyProcess(config, bootstrap=scripted_bootstrap(config, naked=naked)) as envoy,
        loopback.client(envoy.url, timeout=60) as client,
    ):
        yield Bench(config, envoy, service, prefill, decode, client)
