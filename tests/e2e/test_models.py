"""Names of models are matched as engines do it, and ``/v1/models`` has the cards of the engines."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST, body_of, one


@dataclass(frozen=True, slots=True)
class Fleet:
    """A disaggregated pool of SGLang with an adapter, one whose name has colons, and one of vLLM with an adapter."""

    engines: dict[str, HostedEngine]
    client: httpx.Client

    def forget(self) -> None:
        for engine in self.engines.values():
            engine.forget()

    def reached(self) -> list[str]:
        return [name for name, engine in self.engines.items() if engine.requests()]

    def models(self) -> dict[str, dict[str, Any]]:
        return {card["id"]: card for card in self.client.get("/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    with ExitStack() as running:
        hosted = HostedEngines()
        lora = ("--dp-size", "2", "--model", "/models/qwen", "--lora-adapter", "my-lora", *FAST)
        engines = {
            "prefill": hosted.add("--role", "prefill", "--context-length", "4000", *lora),
            "decode": hosted.add("--role", "decode", "--context-length", "5000", *lora),
            "colons": hosted.add("--model", "s3://bucket/qwen:v2", *FAST),
            "vllm": hosted.add("--kind", "vllm", "--model", "base", "--lora-adapter", "tuned", *FAST),
        }
        running.enter_context(hosted)
        pools = [
            {
                "models": ["qwen", "qwen-alias"],
                "prefill": {"endpoints": [engines["prefill"].url]},
                "decode": {"endpoints": [engines["decode"].url]},
            },
            {"models": ["qwen:v2"], "workers": {"endpoints": [engines["colons"].url]}},
            {"models": ["base"], "workers": {"endpoints": [engines["vllm"].url]}},
        ]
        service = running.enter_context(ServiceProcess(write_config(pools)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        yield Fleet(engines, client)
        service.wait_until_idle()


@pytest.fixture
def fleet(running: Fleet) -> Fleet:
    running.forget()
    return running


def ask(fleet: Fleet, model: str | None) -> httpx.Response:
    body = {"prompt": "hi", "max_tokens": 1} | ({} if model is None else {"model": model})
    return fleet.client.post("/v1/completions", json=body)


@pytest.mark.parametrize(
    ("model", "reached"),
    [
        ("qwen", ["prefill", "decode"]),
        ("qwen:my-lora", ["prefill", "decode"]),
        ("qwen : my-lora", ["prefill", "decode"]),
        ("qwen-alias:a:b", ["prefill", "decode"]),
        ("my-lora", ["prefill", "decode"]),
        ("qwen:v2", ["colons"]),
        ("qwen:v2:other", ["colons"]),
        ("tuned", ["vllm"]),
    ],
)
def test_request_reaches_the_pool_of_its_model(fleet: Fleet, model: str, reached: list[str]) -> None:
    """A configured name comes first, then the longest base before a colon, then an adapter that an engine lists."""
    assert ask(fleet, model).status_code == 200
    assert fleet.reached() == reached
    assert all(body_of(one([fleet.engines[name]]))["model"] == model for name in reached)


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("other", 404, "model_not_found"),
        ("other:my-lora", 404, "model_not_found"),
        (":qwen", 404, "model_not_found"),
        ("default", 400, "model_missing"),
        ("default:my-lora", 400, "model_missing"),
        (None, 400, "model_missing"),
    ],
)
def test_model_of_no_pool_is_refused(fleet: Fleet, model: str | None, status: int, code: str) -> None:
    """``default`` is SGLang's name of the only model, and here are several."""
    response = ask(fleet, model)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert fleet.reached() == []


def test_cards_are_those_of_the_engines(fleet: Fleet) -> None:
    """Of the lengths of a pool the shortest counts, and an adapter has the name of a listed model as its parent."""
    models = fleet.models()

    assert set(models) == {"qwen", "qwen-alias", "my-lora", "qwen:v2", "base", "tuned"}
    for name in ("qwen", "qwen-alias"):
        assert (models[name]["root"], models[name]["max_model_len"]) == ("/models/qwen", 4000)
    assert (models["my-lora"]["root"], models["my-lora"]["parent"]) == ("/adapters/my-lora", "qwen")
    assert (models["tuned"]["parent"], models["tuned"]["owned_by"]) == ("base", "vllm")
    assert models["base"]["created"] > 0
    assert fleet.client.get("/v1/models/my-lora").json() == models["my-lora"]


@pytest.mark.parametrize("adapters", ["my-lora", ["my-lora", None]])
def test_adapters_beside_a_prompt_pass(fleet: Fleet, adapters: object) -> None:
    """One for all prompts, or a list with one for each."""
    texts = ["a", "b"] if isinstance(adapters, list) else "a"
    body = {"text": texts, "model": "qwen", "lora_path": adapters, "sampling_params": {"max_new_tokens": 1}}
    assert fleet.client.post("/generate", json=body).status_code == 200

    assert [body_of(one([fleet.engines[name]]))["lora_path"] for name in ("prefill", "decode")] == [adapters] * 2
