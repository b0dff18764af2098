"""With routing fields in ``x-override-*`` headers, both legs run as picked and bodies stay as the client sent them."""

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
    """A pool per kind of engine: prefill and decode engine by model."""

    pools: dict[str, tuple[HostedEngine, HostedEngine]]
    client: httpx.Client
    service: ServiceProcess

    def send(self, model: str, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send a request, and return both legs as the engines received them."""
        for engine in self.pools[model]:
            engine.forget()
        text = json.dumps({"model": model, **body}, indent=1)
        response = self.client.post(path, content=text, headers={"content-type": "application/json", **UNTRUSTED})
        assert response.status_code == 200, response.text
        prefill, decode = (one([engine]) for engine in self.pools[model])
        assert prefill["outcome"] == decode["outcome"] == "finished"
        return prefill, decode


UNTRUSTED = {"x-override-routed-dp-rank": "99", "x-override-priority": "7", "x-dp-prefill-rid": "evil"}
"""Headers that a client may try; none of them reaches an engine."""
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
def test_headers_route_both_legs_with_unchanged_bodies(
    fleet: Fleet, model: str, path: str, body: dict[str, Any]
) -> None:
    """Each leg runs on the rank of its own headers, in one room, and both bodies are the client's, byte for byte."""
    pairs = set()
    for _ in range(12):
        prefill, decode = fleet.send(model, path, body)
        sent = json.dumps({"model": model, **body}, indent=1)
        assert prefill["body"] == decode["body"] == sent
        leaked = [
            {name.removeprefix("x-override-"): leg["headers"][name] for name in leg["headers"] if "override" in name}
            for leg in (prefill, decode)
        ]
        assert [each.pop("routed-dp-rank") for each in leaked] == [str(prefill["rank"]), str(decode["rank"])]
        assert len({each.pop("rid") for each in leaked}) == 2
        assert leaked[0] == leaked[1]
        assert leaked[0].keys() == {"bootstrap-host", "bootstrap-port", "bootstrap-room", "disagg-prefill-dp-rank"}
        assert leaked[0]["disagg-prefill-dp-rank"] == str(prefill["rank"])
        assert int(leaked[0]["bootstrap-room"]) % PREFILL_RANKS == prefill["rank"]
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
        pytest.param("off", "/generate", GENERATE, id="engines without the option"),
        pytest.param("old", "/generate", GENERATE, id="engines that are too old"),
    ],
)
def test_bodies_have_the_routing_fields_that_headers_cannot_hold(
    fleet: Fleet, model: str, path: str, body: dict[str, Any]
) -> None:
    """The body has the routing fields that headers cannot hold, or that the engine would not read there."""
    prefill, decode = fleet.send(model, path, body)

    for leg in (prefill, decode):
        assert not [name for name in leg["headers"] if name.startswith("x-override-")]
        assert body_of(leg)["routed_dp_rank"] == leg["rank"]


@pytest.mark.parametrize("model", ["newest", "engine picks", "listeners"])
@pytest.mark.parametrize("keys", [EVIL.keys(), {"routed_dp_rank"}, {"data_parallel_rank"}], ids=", ".join)
def test_a_client_rank_in_a_body_is_replaced(fleet: Fleet, model: str, keys: Collection[str]) -> None:
    """A body with its own routing fields is rewritten, also if headers could hold the fields of the service."""
    legs = fleet.send(model, "/generate", {**GENERATE, **{key: EVIL[key] for key in keys}})

    for leg in legs:
        body = body_of(leg)
        assert not [key for key in EVIL if body.get(key) == EVIL[key]]
        assert (body.get("routed_dp_rank") == leg["rank"]) is (model == "newest")


def test_engines_without_override_headers_are_logged_once(fleet: Fleet) -> None:
    """The log names the engines that ignore override headers once, with the remedy, and no others."""
    lines = [line for line in fleet.service.log().splitlines() if "overrides_not_read" in line]

    assert len(lines) == 4
    named = {engine.url for name in ("off", "old") for engine in fleet.pools[name]}
    assert all(any(url in line for url in named) for line in lines)
    assert all("SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1" in line for line in lines)
