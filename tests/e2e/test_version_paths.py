"""Each release serves its paths, with routing fields in bodies or headers, in disaggregated and aggregated pools."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import DECODE_RANKS, FAST, PREFILL_RANKS, body_of, one

PAIRS: Final = ("0.4.6", "0.5.8", "0.5.10", "0.5.11", "0.5.19", "0.5.20", "0.5.21", "0.5.22")
BY_HEADERS: Final = ("0.5.14", "0.5.15", "0.5.17", "0.5.18")
"""Releases of disaggregated engines that read override headers."""
WORKERS: Final = ("0.4.6", "0.4.7", "0.5.9", "0.5.10", "0.5.15", "0.5.17", "0.5.18")
"""Releases of aggregated engines. Those from 0.5.15 to 0.5.17 read no ``data_parallel_rank`` on /generate."""
HONOUR: Final = {"client_dp_rank": "honour"}

RESPONSES = ("/v1/responses", {"input": "hi", "max_output_tokens": 2})
MESSAGES = ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
COMPLETIONS = ("/v1/completions", {"prompt": "hi", "max_tokens": 2})
GENERATE = ("/generate", {"text": "a b c", "sampling_params": {"max_new_tokens": 2}})


@dataclass(frozen=True, slots=True)
class Fleet:
    """A pool for each row, by the name of its model."""

    client: httpx.Client
    pools: dict[str, tuple[HostedEngine, HostedEngine]]
    workers: dict[str, HostedEngine]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with ExitStack() as running:
        engines = HostedEngines()

        def pair(version: str, *options: str) -> tuple[HostedEngine, HostedEngine]:
            flags = ("--sglang-version", version, "--dp-attention", *options, *FAST)
            return (
                engines.add("--role", "prefill", "--dp-size", str(PREFILL_RANKS), *flags),
                engines.add("--role", "decode", "--dp-size", str(DECODE_RANKS), *flags),
            )

        pools = {version: pair(version) for version in PAIRS}
        pools |= {f"{version} by headers": pair(version, "--header-overrides") for version in BY_HEADERS}
        workers = {version: engines.add("--dp-size", "4", "--sglang-version", version, *FAST) for version in WORKERS}
        running.enter_context(engines)
        config: list[dict[str, Any]] = [
            {
                "models": [model],
                "prefill": {"endpoints": [prefill.url]},
                "decode": {"endpoints": [decode.url]},
                "policy": HONOUR,
                "routing_fields": "headers" if "headers" in model else "body",
            }
            for model, (prefill, decode) in pools.items()
        ]
        config += [
            {"models": [f"worker {version}"], "workers": {"endpoints": [worker.url]}, "policy": HONOUR}
            for version, worker in workers.items()
        ]
        patient = {"interval": "1s", "timeout": "5s", "stale_after": "30s"}
        service = running.enter_context(ServiceProcess(write_config(config, load=patient)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url))
        service.wait_until_fresh()
        yield Fleet(client, pools, workers)


@pytest.mark.parametrize(
    ("version", "asked", "served"),
    [
        ("0.5.19", RESPONSES, False),
        ("0.5.20", RESPONSES, True),
        ("0.5.21", RESPONSES, True),
        ("0.5.21", MESSAGES, False),
        ("0.5.22", MESSAGES, True),
        ("0.4.6", CHAT, True),
        ("0.4.6", COMPLETIONS, True),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_a_path_is_served_from_its_release_on(
    fleet: Fleet, version: str, asked: tuple[str, dict[str, Any]], served: bool
) -> None:
    """A path is served from the release on that reads the fields there, on the requested ranks."""
    legs = fleet.pools[version]
    for engine in legs:
        engine.forget()
    path, body = asked
    pins = {"disagg_prefill_dp_rank": 3, "routed_dp_rank": 1}
    response = fleet.client.post(path, json={"model": version, **body, **pins})

    if served:
        assert response.status_code == 200, response.text
        assert [one([engine])["outcome"] for engine in legs] == ["finished"] * 2
        assert one(legs[:1])["rank"] == 3
        assert one(legs[1:])["rank"] == 1
    else:
        assert (response.status_code, response.headers["x-dp-extproc-reason"]) == (400, "engine_version_lacks_path")
        assert not [request for engine in legs for request in engine.requests()]


@pytest.mark.parametrize(
    ("version", "asked", "by_headers"),
    [
        ("0.5.14", GENERATE, False),
        ("0.5.15", GENERATE, True),
        ("0.5.17", GENERATE, True),
        ("0.5.17", CHAT, False),
        ("0.5.18", CHAT, True),
        ("0.5.18", COMPLETIONS, False),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_headers_have_the_routing_fields_from_their_release_on(
    fleet: Fleet, version: str, asked: tuple[str, dict[str, Any]], by_headers: bool
) -> None:
    """Headers have the routing fields from the release on that reads them on a path, and bodies before."""
    model = f"{version} by headers"
    for engine in fleet.pools[model]:
        engine.forget()
    path, body = asked
    response = fleet.client.post(path, json={"model": model, **body})
    assert response.status_code == 200, response.text
    for engine in fleet.pools[model]:
        leg = one([engine])
        leaked = leg["headers"].get("x-override-routed-dp-rank")
        assert leaked == (str(leg["rank"]) if by_headers else None)
        assert body_of(leg).get("routed_dp_rank") == (None if by_headers else leg["rank"])


@pytest.mark.parametrize("version", WORKERS)
@pytest.mark.parametrize("key", ["data_parallel_rank", "routed_dp_rank"])
def test_aggregated_engines_get_the_rank_under_their_own_name(fleet: Fleet, version: str, key: str) -> None:
    """The rank has the engine's own name, whatever name a client uses; a release that reads no rank gets none."""
    worker = fleet.workers[version]
    takes = version != "0.4.6"
    name = "routed_dp_rank" if tuple(map(int, version.split("."))) >= (0, 5, 10) else "data_parallel_rank"
    path, body = GENERATE
    for rank in range(4):
        worker.forget()
        response = fleet.client.post(path, json={"model": f"worker {version}", **body, key: rank})
        assert response.status_code == 200, response.text
        request = one([worker])
        leaked = {each: value for each, value in body_of(request).items() if each.endswith("_rank")}
        assert leaked == ({name: rank} if takes else {})
        assert not takes or request["rank"] == rank


@pytest.mark.parametrize("version", ["0.4.6", "0.5.8", "0.5.10", "0.5.11", "0.5.21", "0.5.22"])
@pytest.mark.parametrize(
    "prompts",
    [{"input_ids": [[1, 2, 3], [4, 5], [6]]}, {"text": ["a", "b", "c"]}],
    ids=lambda prompts: next(iter(prompts)),
)
def test_batches_of_generate_have_a_room_for_each_prompt(fleet: Fleet, version: str, prompts: dict[str, Any]) -> None:
    """Each prompt, of tokens or of text, has its own room and id, and all run on one pair of ranks."""
    legs = fleet.pools[version]
    for engine in legs:
        engine.forget()
    body = {"model": version, **prompts, "sampling_params": {"max_new_tokens": 2}}
    response = fleet.client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    assert len(response.json()) == 3
    prefill, decode = one(legs[:1]), one(legs[1:])
    rooms, ids = body_of(decode)["bootstrap_room"], {each for leg in (prefill, decode) for each in body_of(leg)["rid"]}

    assert prefill["outcome"] == decode["outcome"] == "finished"
    assert body_of(prefill)["bootstrap_room"] == rooms
    assert (len(set(rooms)), len(ids)) == (3, 6)
    assert {room % PREFILL_RANKS for room in rooms} == {prefill["rank"]}
    assert {key: body_of(decode)[key] for key in prompts} == prompts
