"""What the tests of this folder share: everything around one Envoy, and readers of its answers."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx

from dp_extproc.config import BodyMode, Config
from dp_extproc.testbed.envoy import EnvoyProcess
from envoy_config.recording_engine import RecordingEngine
from envoy_config.scripted_service import ScriptedService

MAX_BODY_BYTES = 33 << 20
BODY = b'{"model":"small","prompt":"\xc3\xa9"}'


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything around one Envoy."""

    config: Config
    envoy: EnvoyProcess
    service: ScriptedService
    prefill: RecordingEngine
    decode: RecordingEngine
    client: httpx.Client

    def post(self, body: bytes | Iterable[bytes] = b'{"model":"small"}', **headers: str) -> tuple[str, httpx.Response]:
        """Send *body* with a new request id; underscores in header names stand for hyphens."""
        request_id = str(uuid.uuid4())
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = self.client.post("/v1/completions", content=body, headers={"x-request-id": request_id, **named})
        return request_id, response

    def log_line(self, request_id: str, leg: str) -> dict[str, Any]:
        """Wait for both lines of a request that has two legs, and return the one of that leg."""
        lines = self.envoy.wait_for_access_log(request_id, 1 if leg == "main" else 2)
        return next(line for line in lines if line["leg"] == leg)


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


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Read an OpenAI-shaped error."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)
