"""Answer requests as a real SGLang 0.5.23 did.

The engines were ``--dp-size 2``, plain and with DP attention, without header overrides.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import FAST
from lab.engine.recorded_shape import LONG, comparable, events_of, shape
from patience import wait_for

RECORDED = json.loads((Path(__file__).parent / "recorded" / "unified.json").read_text())
SHAPES: dict[str, Any] = RECORDED["shapes"]
SERVERS = {"dp2": (), "dpattn": ("--dp-attention",)}
LIMITS = ("--context-length", "2048", "--max-total-tokens", "8192", "--max-running-requests", "64")
CASES = [pytest.param(server, case, id=f"{server} {case['name']}") for server in SERVERS for case in RECORDED[server]]

OTHER_TESTS = {"/get_server_info", "/v1/loads?format=prometheus"}
"""test_recorded.py has these pages."""
HEADS = [case for server in SERVERS for case in RECORDED[server] if "head" in case]

OTHER_WORDS = {"generate bad json", "/v1/chat/completions bad json", "/v1/completions bad json"}
"""The JSON library words its own errors: orjson there, msgspec here."""


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, EngineProcess]]:
    """Run engines like the recorded ones."""
    engines = {
        name: EngineProcess("unified", 2, *FAST, "--model", "tiny", *LIMITS, *more) for name, more in SERVERS.items()
    }
    try:
        for engine in engines.values():
            engine.start()
        for engine in engines.values():
            engine.wait_until_listening()
        yield engines
    finally:
        for engine in engines.values():
            engine.__exit__(None, None, None)


@pytest.fixture(scope="module")
def busy() -> Iterator[EngineProcess]:
    """Run an engine whose ranks both have as much work as they may, without end."""
    with (
        EngineProcess("unified", 2, *FAST, "--max-running-requests", "1") as engine,
        loopback.client(timeout=None) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        for rank in (0, 1):
            body = {"text": "x", "rid": f"long {rank}", "routed_dp_rank": rank, "sampling_params": ENDLESS}
            pool.submit(client.post, f"{engine.url}/generate", json=body)
        wait_for(lambda: all(each["num_running_reqs"] == 1 for each in loads(engine)))
        yield engine
        httpx.post(f"{engine.url}/abort_request", json={"abort_all": True})


ENDLESS = {"max_new_tokens": 30_000_000}


def loads(engine: EngineProcess) -> list[dict[str, Any]]:
    page: list[dict[str, Any]] = httpx.get(f"{engine.url}/v1/loads").json()["loads"]
    return page


def request_of(engine: EngineProcess, case: dict[str, Any]) -> httpx.Request:
    content = case.get("body", "").replace(LONG, "long" * 3000).encode()
    headers = {"content-type": "application/json"} if content else {}
    return httpx.Request(
        case.get("method", "POST"),
        engine.url + case["target"],
        headers={**headers, **case.get("headers", {})},
        content=content,
    )


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with loopback.client() as client:
        yield client


@pytest.mark.parametrize(("server", "case"), CASES)
def test_answer_is_as_recorded(
    client: httpx.Client, servers: dict[str, EngineProcess], server: str, case: dict[str, Any]
) -> None:
    """It has the same status and headers, the same error text, and the same members in every event."""
    response = client.send(request_of(servers[server], case))

    assert response.status_code == case["status"], response.text
    assert response.headers.get("content-type") == case.get("type", "application/json")
    assert response.headers["vary"] == "Origin"
    if "error" in case:
        assert case["name"] in OTHER_WORDS or comparable(response.text) == comparable(case["error"])
    elif "events" in case:
        assert comparable(json.dumps(events_of(response.text))) == comparable(json.dumps(case["events"]))
    elif "text" in case:
        assert response.text == case["text"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert shape(events_of(response.text)) == SHAPES[f"{case['target']} stream"]
    elif case["target"] not in OTHER_TESTS:
        answer = response.json()
        assert shape(answer) == SHAPES[case["target"] + (" batch" if isinstance(answer, list) else "")]
    if "served_by" in case:
        assert servers[server].requests()[-1]["rank"] == case["served_by"]


@pytest.mark.parametrize("server", SERVERS)
def test_requests_without_a_rank_take_turns(
    client: httpx.Client, servers: dict[str, EngineProcess], server: str
) -> None:
    """So do health checks: one rank after the other."""
    engine = servers[server]
    cases = [case for case in RECORDED[server] if "turn" in case]
    served, before = [], counted(client, engine)
    for case in cases:
        assert client.send(request_of(engine, case)).status_code == 200
        after = counted(client, engine)
        served += [rank for rank in after if after[rank] != before.get(rank)]
        before = after

    # only who begins depends on what was sent before
    assert len(served) == len(cases) > 5
    assert [rank == served[0] for rank in served] == [case["turn"] == cases[0]["turn"] for case in cases]


def counted(client: httpx.Client, engine: EngineProcess) -> dict[int, float]:
    """Return how many tokens each rank has counted so far."""
    found: dict[int, float] = {}
    for family in text_string_to_metric_families(client.get(f"{engine.url}/metrics").text):
        for sample in family.samples:
            if sample.name == "sglang:realtime_tokens_total":
                rank = int(sample.labels["dp_rank"])
                found[rank] = found.get(rank, 0) + sample.value
    return found


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in HEADS])
def test_head_of_a_stream_is_as_recorded(client: httpx.Client, busy: EngineProcess, case: dict[str, Any]) -> None:
    """It comes at once, or with the first token, as from the real engine."""
    head = Event()

    def read() -> str:
        response = client.send(request_of(busy, case), stream=True)
        head.set()
        return response.read().decode()

    busy.forget()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read)
        (leg,) = wait_for(lambda: [leg for each in busy.requests() for leg in each["legs"]])
        assert leg["stage"] == "waiting"
        if case["head"] == "at once":
            assert head.wait(10)
        client.get(f"{busy.url}/v1/models")  # time enough for a head to come
        assert head.is_set() == (case["head"] == "at once")
        client.post(f"{busy.url}/abort_request", json={"rid": leg["rid"]})
        assert stream.result().endswith("data: [DONE]\n\n")
