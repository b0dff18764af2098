"""Token ids that kill an engine never reach one, through any path, pool and body mode."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import FAST

SPLIT, WHOLE = "disaggregated", "aggregated"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A pool of each kind behind one Envoy."""

    engines: Sequence[EngineProcess]
    client: httpx.Client

    def received(self) -> int:
        """Count the requests that any engine has received."""
        return sum(len(engine.requests()) for engine in self.engines)


@pytest.fixture(scope="module", params=["buffered", "full_duplex_streamed"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with ExitStack() as running:
        engines = [EngineProcess(role, 2, "--dp-attention", *FAST) for role in ("prefill", "decode", "unified")]
        for engine in engines:
            running.push(engine)
            engine.start()
        for engine in engines:
            engine.wait_until_listening()
        prefill, decode, unified = ({"endpoints": [engine.url]} for engine in engines)
        pools = [
            {"models": [SPLIT], "prefill": prefill, "decode": decode},
            {"models": [WHOLE], "workers": unified},
        ]
        service = running.enter_context(ServiceProcess(write_config(pools, envoy={"body_mode": request.param})))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url, timeout=20))
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Fleet(engines, client)


@pytest.mark.parametrize("model", [SPLIT, WHOLE])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        pytest.param("/v1/completions", {"prompt": [-1, 5]}, "prompt", id="completions"),
        pytest.param("/v1/completions", {"prompt": [[5], [6, -1]]}, "prompt", id="completions, batch"),
        pytest.param("/v1/completions", {"prompt": [2**31]}, "prompt", id="completions, beyond all"),
        pytest.param("/generate", {"input_ids": [5, -1]}, "input_ids", id="generate"),
        pytest.param("/generate", {"input_ids": [[-1]], "stream": True}, "input_ids", id="generate, batch"),
        pytest.param(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "input_ids": [-1]},
            "input_ids",
            id="chat",
        ),
        pytest.param(
            "/generate",
            {"text": "a", "sampling_params": {"stop_token_ids": [-1], "min_new_tokens": 1}},
            "stop_token_ids",
            id="stop",
        ),
    ],
)
def test_a_lethal_token_id_is_rejected(
    fleet: Fleet, model: str, path: str, body: dict[str, object], param: str
) -> None:
    """The client gets a 400 that names the field, engines get nothing, and the next request is served."""
    before = fleet.received()
    refused = fleet.client.post(path, json={"model": model, **body})
    got = fleet.received() - before
    served = fleet.client.post("/v1/completions", json={"model": model, "prompt": [0, 5], "max_tokens": 2})
    error = refused.json()["error"]

    assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_value", param)
    assert (error["type"], got) == ("invalid_request_error", 0)
    assert served.status_code == 200
    assert all(engine.is_running for engine in fleet.engines)
