"""One fleet serves several pools by model, disaggregated and aggregated, and passes requests without a body."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import openai
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import FAST, body_of, one


@dataclass(frozen=True, slots=True)
class Pools:
    """Three pools behind one Envoy."""

    prefill: EngineProcess
    decode: EngineProcess
    small: EngineProcess
    old: EngineProcess
    client: httpx.Client
    url: str


@pytest.fixture(scope="module")
def running() -> Iterator[Pools]:
    with ExitStack() as running:
        engines = [
            EngineProcess("prefill", 2, "--dp-attention", "--model", "large", *FAST),
            EngineProcess("decode", 2, "--dp-attention", "--model", "large", *FAST),
            EngineProcess("unified", 3, "--model", "small", *FAST),
            EngineProcess("unified", 2, "--model", "old", "--sglang-version", "0.5.9", *FAST),
        ]
        for engine in engines:
            running.push(engine)
            engine.start()
        for engine in engines:
            engine.wait_until_listening()
        prefill, decode, small, old = engines
        pools = [
            {
                "models": ["large", "huge"],
                "prefill": {"endpoints": [prefill.url]},
                "decode": {"endpoints": [decode.url]},
            },
            {"models": ["small"], "workers": {"endpoints": [small.url]}},
            {"models": ["old"], "workers": {"endpoints": [old.url]}},
        ]
        service = running.enter_context(ServiceProcess(write_config(pools)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Pools(prefill, decode, small, old, client, envoy.url)


@pytest.fixture
def pools(running: Pools) -> Pools:
    for engine in (running.prefill, running.decode, running.small, running.old):
        engine.forget()
    return running


def chat(model: str | None) -> dict[str, object]:
    return {
        **({"model": model} if model else {}),
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "stream": False,
    }


@pytest.mark.parametrize("model", ["large", "huge"])
def test_a_disaggregated_pool_is_selected_by_model(pools: Pools, model: str) -> None:
    """Every model of the pool goes to its two engines."""
    assert pools.client.post("/v1/chat/completions", json=chat(model)).status_code == 200

    assert body_of(one([pools.prefill]))["model"] == body_of(one([pools.decode]))["model"] == model
    assert pools.small.requests() == pools.old.requests() == []


def test_an_aggregated_pool_gets_only_a_rank(pools: Pools) -> None:
    """One engine gets the request, without a mirror, with its rank at the front, and runs it there."""
    ranks = set()
    for _ in range(60):  # ties are broken at random; with this many requests a rank is practically never left out
        pools.small.forget()
        assert pools.client.post("/v1/chat/completions", json=chat("small")).status_code == 200
        request = one([pools.small])
        body = body_of(request)
        assert body == {"routed_dp_rank": request["rank"], **chat("small")}
        ranks.add(request["rank"])
        if len(ranks) == 3:
            break

    assert ranks == {0, 1, 2}
    assert pools.prefill.requests() == pools.decode.requests() == []


def test_an_old_aggregated_engine_gets_the_rank_under_its_old_name(pools: Pools) -> None:
    """Before 0.5.10 the field had another name."""
    assert pools.client.post("/v1/chat/completions", json=chat("old")).status_code == 200
    request = one([pools.old])

    assert body_of(request) == {"data_parallel_rank": request["rank"], **chat("old")}


def test_an_aggregated_pool_serves_several_samples(pools: Pools) -> None:
    """``n`` > 1 works if one engine computes both prefill and decode."""
    answer = pools.client.post("/v1/chat/completions", json={**chat("small"), "n": 2})

    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]


def test_an_unknown_model_is_rejected_with_the_known_ones(pools: Pools) -> None:
    """The 404 lists the models of all pools."""
    response = pools.client.post("/v1/chat/completions", json=chat("nope"))
    error = response.json()["error"]

    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert all(model in error["message"] for model in ("large", "huge", "small", "old"))
    assert [r for engine in (pools.prefill, pools.decode, pools.small) for r in engine.requests()] == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/v1/chat/completions", chat(None), id="chat"),
        pytest.param("/generate", {"text": "a"}, id="generate has none"),
    ],
)
def test_a_missing_model_is_rejected_if_several_pools_could_be_meant(
    pools: Pools, path: str, body: dict[str, object]
) -> None:
    """A body without a model is rejected, and the error names the remedy."""
    response = pools.client.post(path, json=body)
    error = response.json()["error"]

    assert (response.status_code, error["code"]) == (400, "model_missing")
    assert "large" in error["message"]


def test_generate_selects_the_pool_by_its_model(pools: Pools) -> None:
    """A model on ``/generate`` selects the pool; engines ignore the key."""
    sent = {"text": "a", "model": "small", "sampling_params": {"max_new_tokens": 1}}

    assert pools.client.post("/generate", json=sent).status_code == 200
    assert body_of(one([pools.small]))["model"] == "small"


def test_models_of_all_pools_are_listed(pools: Pools) -> None:
    """The OpenAI client lists the models of every pool, and looks one up."""
    with openai.OpenAI(base_url=f"{pools.url}/v1", api_key="key", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["large", "huge", "small", "old"]
        assert client.models.retrieve("small").id == "small"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nope")


@pytest.mark.parametrize("path", ["/health", "/model_info", "/server_info", "/get_model_info"])
def test_lookups_go_to_an_engine_that_answers_clients(pools: Pools, path: str) -> None:
    """A decode engine answers lookups that any engine could answer."""
    response = pools.client.get(path)

    assert response.status_code == 200
    if path == "/server_info":
        assert json.loads(response.text)["disaggregation_mode"] == "decode"
