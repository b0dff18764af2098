"""One Envoy per body mode in front of a scripted service and two recording engines."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from dp_extproc.config import BodyMode, Config
from dp_extproc.testbed.envoy import EnvoyProcess
from dp_extproc.testbed.ports import free_ports
from envoy_config.recording_engine import RecordingEngine, run_engine
from envoy_config.scripted_service import ScriptedService, run_service

MAX_BODY_BYTES = 33 << 20


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything around one Envoy."""

    config: Config
    envoy: EnvoyProcess
    service: ScriptedService
    prefill: RecordingEngine
    decode: RecordingEngine
    client: httpx.Client

    def post(self, body: object = b'{"model":"small"}', **headers: str) -> tuple[str, httpx.Response]:
        """Send *body* with a new request id; underscores in header names stand for hyphens."""
        request_id = str(uuid.uuid4())
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = self.client.post("/v1/completions", content=body, headers={"x-request-id": request_id, **named})
        return request_id, response


def make_config(body_mode: BodyMode, ports: list[int], max_body_bytes: int = MAX_BODY_BYTES) -> Config:
    inference, admin, grpc_port = ports
    return Config.model_validate(
        {
            "listen": {"grpc": f"127.0.0.1:{grpc_port}"},
            "envoy": {
                "inference": f"127.0.0.1:{inference}",
                "admin": f"127.0.0.1:{admin}",
                "max_body_bytes": max_body_bytes,
                "body_mode": body_mode,
            },
            "pools": [{"models": ["*"], "workers": {"endpoints": ["http://127.0.0.1:1"]}}],
        }
    )


@pytest.fixture(scope="module", params=list(BodyMode))
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    ports = free_ports(3)
    config = make_config(request.param, ports)
    with (
        run_engine("prefill") as prefill,
        run_engine("decode") as decode,
        run_service(prefill.address, decode.address, ports[2]) as service,
        EnvoyProcess(config) as envoy,
        httpx.Client(base_url=envoy.url, timeout=60, trust_env=False) as client,
    ):
        yield Bench(config, envoy, service, prefill, decode, client)
