"""Test the pages of engines about themselves and their load, release by release, and the debug pages."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import FAST, PROMPTS, Pair, run_pair
from patience import wait_for

CORE = {
    "timestamp", "dp_rank", "num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_total_num_tokens",
    "max_running_requests", "token_usage", "gen_throughput", "cache_hit_rate", "utilization", "memory",
    "disaggregation", "queues",
}  # fmt: skip
RECORDED_0_5_23 = CORE | {
    "num_waiting_uncached_tokens", "num_total_tokens", "num_active_tokens", "num_prealloc_ready_tokens",
    "total_prefill_uncached_tokens", "total_prefill_busy_us", "decode_moments",
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Run a pair without timeouts."""
    with run_pair("0.5.23", "--timeout-waiting", "1000000", "--timeout-bootstrap", "1000000") as pair:
        yield pair


@contextmanager
def server(version: str, *options: str, role: str = "unified", ranks: int = 2) -> Iterator[EngineProcess]:
    with EngineProcess(role, ranks, "--sglang-version", version, *FAST, *options) as engine:
        yield engine


def get(engine: EngineProcess, path: str) -> Any:
    return httpx.get(engine.url + path).raise_for_status().json()


def samples(engine: EngineProcess, name: str) -> list[Sample]:
    """Return all samples of a series on /metrics."""
    text = httpx.get(f"{engine.url}/metrics").text
    return [each for family in text_string_to_metric_families(text) for each in family.samples if each.name == name]


def gauge(engine: EngineProcess, name: str, rank: int) -> float:
    return next(each.value for each in samples(engine, f"sglang:{name}") if each.labels["dp_rank"] == str(rank))


@pytest.mark.parametrize(
    ("version", "options", "sizes"),
    [
        pytest.param("0.5.23", ["--dp-attention"], (1, 4), id="0.5.23, DP attention"),
        pytest.param("0.5.23", [], (4, 1), id="0.5.23, plain DP"),
        pytest.param("0.5.21", ["--dp-attention"], (4, None), id="0.5.21, DP attention"),
    ],
)
def test_server_info_counts_replicas_from_0_5_22(
    version: str, options: list[str], sizes: tuple[int, int | None]
) -> None:
    """With DP attention the ranks share the chunk and the batch."""
    with server(version, *options, "--chunked-prefill-size", "4096", "--model", "m", role="prefill", ranks=4) as engine:
        info, card = get(engine, "/server_info"), get(engine, "/v1/models")["data"][0]
        load = get(engine, "/v1/loads")["loads"]

    assert (info["dp_size"], info.get("attn_dp_size")) == sizes
    assert info["enable_dp_attention"] == bool(options)
    assert info["chunked_prefill_size"] == (1024 if options else 4096)
    assert len(load) == len(info["internal_states"]) == 4
    assert load[0]["max_running_requests"] == (64 if options else 256)
    assert info["version"] == version
    assert info["served_model_name"] == card["id"] == "m"
    assert info["disaggregation_mode"] == "prefill"
    assert info["disaggregation_bootstrap_port"] == engine.bootstrap_port
    assert info["load_balance_method"] == "follow_bootstrap_room"


@pytest.mark.parametrize(
    ("version", "present", "absent"),
    [
        pytest.param(
            "0.5.23",
            ["/server_info", "/get_server_info", "/model_info", "/get_model_info", "/v1/loads", "/ready"],
            ["/get_load"],
            id="0.5.23",
        ),
        pytest.param("0.5.19", ["/get_load", "/v1/loads"], ["/ready"], id="0.5.19"),
        pytest.param(
            "0.5.5",
            ["/get_server_info", "/get_load", "/get_model_info"],
            ["/server_info", "/v1/loads", "/ready", "/model_info"],
            id="0.5.5",
        ),
    ],
)
def test_pages_exist_by_release(version: str, present: list[str], absent: list[str]) -> None:
    """Each release has its own pages."""
    with server(version) as engine:
        assert {path: httpx.get(engine.url + path).status_code for path in present} == dict.fromkeys(present, 200)
        assert {path: httpx.get(engine.url + path).status_code for path in absent} == dict.fromkeys(absent, 404)


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        ("0.5.23", RECORDED_0_5_23),
        ("0.5.17", RECORDED_0_5_23 - {"num_prealloc_ready_tokens"}),
        ("0.5.13", CORE | {"num_waiting_uncached_tokens", "num_total_tokens"}),
        ("0.5.11", CORE | {"num_total_tokens", "num_total_reqs"}),
        ("0.5.8", CORE | {"num_total_reqs"}),
    ],
)
def test_loads_have_fields_by_release(version: str, fields: set[str]) -> None:
    """Fields came one by one; those of 0.5.23 are the recorded ones."""
    with server(version) as engine:
        page = get(engine, "/v1/loads")

    assert set(page["loads"][0]) == fields
    assert ("aggregate" in page) == (version in {"0.5.8", "0.5.11"})


def test_loads_return_parts(pair: Pair) -> None:
    """Parts are one rank, some sections, or the Prometheus form; an unknown section is refused."""
    engine = pair.prefill
    assert [load["dp_rank"] for load in get(engine, "/v1/loads?dp_rank=1")["loads"]] == [1]
    assert not {"memory", "disaggregation", "queues"} & set(get(engine, "/v1/loads?include=core")["loads"][0])
    text = httpx.get(f"{engine.url}/v1/loads?format=prometheus")
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert '# TYPE sglang_num_used_tokens gauge\nsglang_num_used_tokens{dp_rank="0"} 0\n' in text.text
    assert 'sglang_disagg_prefill_bootstrap_queue_reqs{dp_rank="3"} 0\n' in text.text
    refused = httpx.get(f"{engine.url}/v1/loads?include=nonsense")
    assert refused.status_code == 400
    assert "Invalid include sections" in refused.text


def test_loads_have_queues_that_metrics_lack(pair: Pair) -> None:
    """On a prefill engine that waits for decode /v1/loads has the tokens, and /metrics stays as it was."""
    body = pair.meeting(pair.room(2), routed_dp_rank=2, text="x" * 4000, rid="lonely")
    before = gauge(pair.prefill, "num_prefill_bootstrap_queue_reqs", 2)
    answer = pair.post(pair.prefill, "/generate", **body)
    load = wait_for(lambda: next(each for each in loads(pair.prefill) if each["num_waiting_reqs"]))

    assert load["dp_rank"] == 2
    assert (load["num_total_tokens"], load["num_used_tokens"], load["num_running_reqs"]) == (1000, 0, 0)
    assert load["disaggregation"]["prefill_bootstrap_queue_reqs"] == 1
    assert gauge(pair.prefill, "num_prefill_bootstrap_queue_reqs", 2) == before == 0
    pair.client.post(f"{pair.prefill.url}/abort_request", json={"rid": "lonely"})
    answer.result()


def test_decode_reserves_kv_room_before_the_cache_arrives(pair: Pair) -> None:
    """The prompt counts as used as soon as there is room for it."""
    answer = pair.post(pair.decode, "/generate", **pair.meeting(pair.room(), rid="early", text="x" * 400))
    load = wait_for(lambda: next((each for each in loads(pair.decode) if each["num_used_tokens"]), None))

    assert load is not None
    assert (load["num_used_tokens"], load["num_active_tokens"], load["num_running_reqs"]) == (100, 0, 0)
    assert load["disaggregation"]["decode_transfer_queue_reqs"] == 1
    pair.client.post(f"{pair.decode.url}/abort_request", json={"rid": "early"})
    answer.result()
    wait_for(lambda: not any(each["num_used_tokens"] for each in loads(pair.decode)))


def loads(engine: EngineProcess) -> list[dict[str, Any]]:
    page: list[dict[str, Any]] = get(engine, "/v1/loads")["loads"]
    return page


def test_full_decode_rank_holds_prefill_back() -> None:
    """Prefill's legs wait in the bootstrap queue while a decode rank has no KV room."""
    patient = ("--timeout-waiting", "1000000", "--timeout-bootstrap", "1000000")
    with run_pair("0.5.23", "--max-total-tokens", "1000", *patient) as pair:
        first = pair.meeting(pair.room(), text="x" * 3600)
        second = pair.meeting(pair.room(1), text="x" * 3600)
        on_decode = [pair.post(pair.decode, "/generate", **first, routed_dp_rank=0)]
        wait_for(lambda: loads(pair.decode)[0]["disaggregation"]["decode_transfer_queue_reqs"])
        on_decode.append(pair.post(pair.decode, "/generate", **second, routed_dp_rank=0))
        on_prefill = pair.post(pair.prefill, "/generate", **second)
        wait_for(lambda: loads(pair.decode)[0]["num_prealloc_ready_tokens"] == 900)
        wait_for(lambda: loads(pair.prefill)[1]["disaggregation"]["prefill_bootstrap_queue_reqs"])
        assert loads(pair.prefill)[1]["num_used_tokens"] == 0
        assert pair.post(pair.prefill, "/generate", **first).result().status_code == 200

        assert [answer.result().status_code for answer in on_decode] == [200, 200]
        assert on_prefill.result().status_code == 200
        too_long = pair.post(pair.decode, "/generate", **pair.meeting(pair.room()), text="x" * 4004, rid="r").result()
        limit = "exceeds the maximum allowed length (994 tokens). Use a shorter input or enable --allow-auto-truncate."
        assert too_long.json() == {"error": {"message": f"Input length (1001 tokens) {limit}"}}


def test_loads_have_a_time_per_rank(pair: Pair) -> None:
    """Those of an idle engine are fresh."""
    seen = time.time()
    stamps = wait_for(lambda: [each["timestamp"] for each in loads(pair.decode) if each["timestamp"] > seen - 0.05])

    assert len(stamps) == 2


def test_metrics_have_sglangs_names_and_labels(pair: Pair) -> None:
    """Names have colons; gauges of schedulers have the rank, counters of the HTTP process do not."""
    pair.send("/generate", pair.meeting(pair.room(1)))
    used = samples(pair.prefill, "sglang:num_used_tokens")
    assert sorted(each.labels["dp_rank"] for each in used) == ["0", "1", "2", "3"]
    assert used[0].labels == {
        "dp_rank": "0", "engine_type": "prefill", "model_name": "strict-engine", "moe_ep_rank": "0", "pp_rank": "0",
        "tp_rank": "0",
    }  # fmt: skip
    (counted,) = samples(pair.prefill, "sglang:prompt_tokens_total")
    assert "dp_rank" not in counted.labels
    assert counted.value >= 2
    computed = {
        each.labels["dp_rank"]: each.value
        for each in samples(pair.prefill, "sglang:realtime_tokens_total")
        if each.labels["mode"] == "prefill_compute"
    }
    assert computed["1"] >= 2
    assert sum(load["total_prefill_uncached_tokens"] for load in loads(pair.prefill)) == sum(computed.values())


def test_metrics_differ_by_release() -> None:
    """One rank has no dp_rank; 0.5.10 has another name for the bootstrap queue; constants come from all schedulers."""
    with server("0.5.10", "--attn-tp-size", "2", ranks=1) as engine:
        text = httpx.get(f"{engine.url}/metrics").text
        assert "dp_rank" not in text
        assert "sglang:num_prefill_prealloc_queue_reqs{" in text
        assert "sglang:kv_used_tokens" not in text
        assert len(samples(engine, "sglang:max_total_num_tokens")) == 2
        assert len(samples(engine, "sglang:num_used_tokens")) == 1
    with server("0.5.10", "--no-enable-metrics") as engine:
        assert httpx.get(f"{engine.url}/metrics").status_code == 404


def has_running(engine: EngineProcess, rank: int, count: int) -> bool:
    return gauge(engine, "num_running_reqs", rank) == count


def test_ranks_without_dp_attention_step_alone() -> None:
    """A busy replica leaves its neighbour's gauges fresh; with DP attention they freeze."""
    for options, expected in (([], 0), (["--dp-attention"], 1)):
        with server("0.5.23", *options, "--decode-log-interval", "1") as engine:
            with ThreadPoolExecutor(2) as pool:
                long = {"sampling_params": {"max_new_tokens": 3000}, "routed_dp_rank": 0, "rid": "long"}
                body = {**PROMPTS["/generate"], **long}
                answer = pool.submit(httpx.post, f"{engine.url}/generate", json=body, timeout=30)
                wait_for(partial(has_running, engine, 0, 1))
                httpx.post(f"{engine.url}/generate", json={**PROMPTS["/generate"], "routed_dp_rank": 1})

                assert gauge(engine, "num_running_reqs", 1) == expected
                httpx.post(f"{engine.url}/abort_request", json={"rid": "long"})
                answer.result()
            wait_for(partial(has_running, engine, 1, 0))


def test_health_is_a_generation(pair: Pair) -> None:
    """/health moves the counters of rank 0 of a prefill engine; /ready does not."""
    before = [load["total_prefill_uncached_tokens"] for load in loads(pair.prefill)]
    assert httpx.get(f"{pair.prefill.url}/ready").status_code == 200
    assert [load["total_prefill_uncached_tokens"] for load in loads(pair.prefill)] == before
    for engine in (pair.prefill, pair.decode):
        assert httpx.get(f"{engine.url}/health").status_code == 200

    wait_for(lambda: loads(pair.prefill)[0]["total_prefill_uncached_tokens"] == before[0] + 1)


@pytest.mark.parametrize(
    ("version", "query", "expected"),
    [
        (
            "0.5.23",
            "prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1",
            {"dp_size": 4, "follow_bootstrap_room": True},
        ),
        ("0.5.9", "engine_rank=-1&target_dp_group=-1&target_pp_rank=-1", {"prefill_dp_size": 4}),
    ],
)
def test_bootstrap_server_reports_the_ranks(version: str, query: str, expected: dict[str, Any]) -> None:
    """/route has the number of ranks, on a port without authentication."""
    with server(version, "--api-key", "k", role="prefill", ranks=4) as engine:
        bootstrap = f"http://127.0.0.1:{engine.bootstrap_port}"
        facts = httpx.get(f"{bootstrap}/route?{query}").json()

        assert {key: facts[key] for key in expected} == expected
        assert httpx.get(f"{bootstrap}/health").text == "OK"
        assert httpx.get(f"{bootstrap}/route").status_code == 400


def test_decode_picks_ranks_in_turn() -> None:
    """It is round robin by default; an explicit rank does not take a turn."""
    with server("0.5.23", role="decode") as engine:

        def rank(**body: Any) -> int:
            fake = {**PROMPTS["/generate"], "bootstrap_host": "2.2.2.2", "bootstrap_room": 7, **body}
            return int(httpx.post(f"{engine.url}/generate", json=fake).json()["meta_info"]["dp_rank"])

        assert [rank(), rank(routed_dp_rank=0), rank(routed_dp_rank=0), rank(), rank()] == [0, 0, 0, 1, 0]


def test_page_can_fail_and_recover(pair: Pair) -> None:
    """A page can hang, fail and answer garbage, and be restored."""
    engine = pair.prefill
    engine.fault(loads="500", metrics="garbage", server_info="hang")
    assert httpx.get(f"{engine.url}/v1/loads").status_code == 500
    assert not re.search(rb"^sglang", httpx.get(f"{engine.url}/metrics").content, re.MULTILINE)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{engine.url}/server_info", timeout=0.2)
    assert httpx.get(f"{engine.url}/debug/faults").json() == {
        "loads": {"kind": "500"}, "metrics": {"kind": "garbage"}, "server_info": {"kind": "hang"}
    }  # fmt: skip
    engine.fault(loads="ok", metrics="ok", server_info="ok")
    assert len(loads(engine)) == 4
    assert get(engine, "/server_info")["version"] == "0.5.23"
    assert httpx.post(f"{engine.url}/debug/faults", json={"loads": "nonsense"}).status_code == 400


def test_journal_has_both_legs(pair: Pair) -> None:
    """It has headers, the body as it came, fields, rank, outcome and times."""
    pair.prefill.forget()
    assert pair.prefill.requests() == []
    content = b'{"text" : "\\u00e9 \xc3\xa9", "sampling_params":{"max_new_tokens":1},'
    content += b'"bootstrap_room":5,"bootstrap_host":"2.2.2.2"}'
    headers = [("content-type", "application/json"), ("X-Twice", "a"), ("x-twice", "b")]
    assert httpx.post(f"{pair.prefill.url}/generate", content=content, headers=headers).status_code == 200
    (noted,) = pair.prefill.requests()

    assert noted["body"].encode() == content
    assert noted["headers"]["x-twice"] == "a, b"
    assert (noted["method"], noted["path"], noted["rank"], noted["outcome"]) == ("POST", "/generate", 1, "finished")
    assert noted["received_at"] <= noted["first_token_at"] <= noted["ended_at"]
    assert noted["legs"][0]["bootstrap_room"] == 5
    assert httpx.post(f"{pair.prefill.url}/generate", content=b"\xff").status_code == 400
    assert pair.prefill.requests()[-1]["body_base64"] == "/w=="
