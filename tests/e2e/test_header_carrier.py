"""``routing_fields: headers``: ``x-override-*`` headers route both legs, and bodies stay as they were sent."""

import json
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import DECODE_RANKS, EVIL, FAST, PREFILL_RANKS, body_of, one

GENERATE = {"text": "a b c", "sampling_params": {"max_new_tokens": 2}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETION = {"prompt": "p", "max_tokens": 2}


@dataclass(frozen=True, slots=True)
class Fleet:
    """A pool per kind of engine: prefill and decode server by model."""

    pools: dict[str, tuple[HostedEngine, HostedEngine]]
    client: httpx.Client
    service: ServiceProcess

    def send(self, model: str, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send a request, and give what both legs were."""
        for engine in self.pools[model]:
            engine.forget()
        text = json.dumps({"model": model, **body}, indent=1)
        response = self.client.post(path, content=text, headers={"content-type": "application/json", **FOREIGN})
        assert response.status_code == 200, response.text
        prefill, decode = (one([engine]) for engine in self.pools[model])
        assert prefill["outcome"] == decode["outcome"] == "finished"
        return prefill, decode


FOREIGN = {"x-override-routed-dp-rank": "99", "x-override-priority": "7", "x-dp-prefill-rid": "evil"}
"""What a client may try; none of it reaches an engine."""
OPTIONS = {
    "newest": ("--header-overrides",),
    "engine picks": ("--header-overrides",),
    "listeners": ("--header-overrides", "--rank-listeners"),
    "early": ("--header-overrides", "--sglang-version", "0.5.15"),
    "off": (),
    "old": ("--sglang-version", "0.5.11"),
}


@pytest.fixture(scope="module", params=["buffered", "full_duplex_streamed"])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with ExitStack() as running:
        engines = HostedEngines()

        def add(role: str, ranks: int, name: str) -> HostedEngine:
            options = ("--role", role, "--dp-size", str(ranks), "--dp-attention", *OPTIONS[name], *FAST)
            return engines.add(*options, listeners=ranks if name == "listeners" else 1)

        pools = {name: (add("prefill", PREFILL_RANKS, name), add("decode", DECODE_RANKS, name)) for name in OPTIONS}
        running.enter_context(engines)
        config = [
            {
                "models": [name],
                "routing_fields": "headers",
                "prefill": {"endpoints": _endpoints(name, prefill, PREFILL_RANKS)},
                "decode": {"endpoints": _endpoints(name, decode, DECODE_RANKS)},
                **({"policy": {"dp_rank": "none"}} if name == "engine picks" else {}),
            }
            for name, (prefill, decode) in pools.items()
        ]
        envoy_section = {"body_mode": request.param}
        service = running.enter_context(ServiceProcess(write_config(config, envoy=envoy_section)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        yield Fleet(pools, client, service)


def _endpoints(name: str, engine: HostedEngine, ranks: int) -> list[Any]:
    if name != "listeners":
        return [engine.url]
    return [{"url": f"http://127.0.0.1:{engine.port + rank}", "dp_rank": rank} for rank in range(ranks)]


@pytest.mark.parametrize(
    ("model", "path", "body"),
    [
        pytest.param("newest", "/generate", GENERATE, id="generate"),
        pytest.param("newest", "/v1/chat/completions", CHAT, id="chat"),
        pytest.param("early", "/generate", GENERATE, id="generate of 0.5.15"),
    ],
)
def test_headers_say_it_all(fleet: Fleet, model: str, path: str, body: dict[str, Any]) -> None:
    """Each leg runs on the rank that its own headers name, in one room; both bodies are the client's, byte for byte."""
    pairs = set()
    for _ in range(12):
        prefill, decode = fleet.send(model, path, body)
        sent = json.dumps({"model": model, **body}, indent=1)
        assert prefill["body"] == decode["body"] == sent
        told = [
            {name.removeprefix("x-override-"): leg["headers"][name] for name in leg["headers"] if "override" in name}
            for leg in (prefill, decode)
        ]
        assert [each.pop("routed-dp-rank") for each in told] == [str(prefill["rank"]), str(decode["rank"])]
        assert len({each.pop("rid") for each in told}) == 2
        assert told[0] == told[1]
        assert told[0].keys() == {"bootstrap-host", "bootstrap-port", "bootstrap-room", "disagg-prefill-dp-rank"}
        assert told[0]["disagg-prefill-dp-rank"] == str(prefill["rank"])
        assert int(told[0]["bootstrap-room"]) % PREFILL_RANKS == prefill["rank"]
        assert not [name for leg in (prefill, decode) for name in leg["headers"] if name.startswith("x-dp-")]
        pairs.add((prefill["rank"], decode["rank"]))

    assert any(p != d for p, d in pairs)


@pytest.mark.parametrize(
    ("model", "path", "body"),
    [
        pytest.param("newest", "/v1/completions", COMPLETION, id="a path that reads no headers"),
        pytest.param("early", "/v1/chat/completions", CHAT, id="a path that reads them later"),
        pytest.param("newest", "/generate", {**GENERATE, "text": ["a", "b"]}, id="a batch"),
        pytest.param("newest", "/v1/chat/completions", {**CHAT, "stream": True}, id="a stream"),
        pytest.param("off", "/generate", GENERATE, id="engines that were not told to"),
        pytest.param("old", "/generate", GENERATE, id="engines that are too old"),
    ],
)
def test_bodies_say_it_elsewhere(fleet: Fleet, model: str, path: str, body: dict[str, Any]) -> None:
    """What headers cannot carry, or engines would not read there, is carried by the body."""
    prefill, decode = fleet.send(model, path, body)

    for leg in (prefill, decode):
        assert not [name for name in leg["headers"] if name.startswith("x-override-")]
        assert body_of(leg)["routed_dp_rank"] == leg["rank"]


@pytest.mark.parametrize("model", ["newest", "engine picks", "listeners"])
@pytest.mark.parametrize("keys", [EVIL.keys(), {"routed_dp_rank"}, {"data_parallel_rank"}], ids=", ".join)
def test_ranks_of_clients_do_not_get_through(fleet: Fleet, model: str, keys: Collection[str]) -> None:
    """A body that would route itself is rewritten, also where no header would have said otherwise."""
    legs = fleet.send(model, "/generate", {**GENERATE, **{key: EVIL[key] for key in keys}})

    for leg in legs:
        body = body_of(leg)
        assert not [key for key in EVIL if body.get(key) == EVIL[key]]
        assert (body.get("routed_dp_rank") == leg["rank"]) is (model == "newest")


def test_engines_that_do_not_obey_are_said_once(fleet: Fleet) -> None:
    """The log names them with the remedy, and only them."""
    lines = [line for line in fleet.service.log().splitlines() if "overrides_not_read" in line]

    assert len(lines) == 4
    named = {engine.url for name in ("off", "old") for engine in fleet.pools[name]}
    assert all(any(url in line for url in named) for line in lines)
    assert all("SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1" in line for line in lines)
