"""Test the prefix cache of every DP rank, as clients and pages of engines show it."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import FAST, Pair, run_pair
from patience import wait_for

TEXT = "".join(f"{number:04}" for number in range(1000))
"""A thousand tokens, each different."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with run_pair("0.5.23") as pair:
        yield pair


def ask(pair: Pair, rank: int, text: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send both legs of a prompt, and return both answers' meta_info."""
    prefill, decode = pair.send("/generate", pair.meeting(pair.room(rank), text=text, **more))
    return prefill.json()["meta_info"], decode.json()["meta_info"]


def load(engine: EngineProcess, rank: int) -> dict[str, Any]:
    page = httpx.get(f"{engine.url}/v1/loads?dp_rank={rank}").raise_for_status().json()
    found: dict[str, Any] = page["loads"][0]
    return found


def series(engine: EngineProcess, **labels: str) -> dict[str, float]:
    """Read the samples of /metrics that have these labels."""
    families = text_string_to_metric_families(httpx.get(f"{engine.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {sample.name: sample.value for sample in samples if labels.items() <= sample.labels.items()}


def test_prompt_is_cached_on_its_rank(pair: Pair) -> None:
    """On that rank all but its last token is found; another rank computes it anew. Both answers report it."""
    reported = [ask(pair, rank, TEXT) for rank in (1, 1, 2)]

    assert [prefill["dp_rank"] for prefill, _ in reported] == [1, 1, 2]
    for position in (0, 1):
        answers = [each[position] for each in reported]
        assert [each["cached_tokens"] for each in answers] == [0, 999, 0]
        assert [each["cached_tokens_details"] for each in answers] == [None, {"device": 999, "host": 0}, None]
        assert [each["prompt_tokens"] for each in answers] == [1000] * 3
    computed = [load(pair.prefill, rank)["total_prefill_uncached_tokens"] for rank in range(4)]
    assert computed == [0, 1001, 1000, 0]


def test_pages_report_the_cache() -> None:
    """Cached tokens are not used ones; rates, counters and gauges differ. Decode keeps no cache."""
    with run_pair("0.5.23") as pair:
        for text in (TEXT, TEXT[:2000] + "x"):
            ask(pair, 3, text)
        at_rest = wait_for(
            lambda: next((each for each in [load(pair.prefill, 3)] if not each["num_used_tokens"]), None)
        )
        assert at_rest is not None
        assert (at_rest["num_total_tokens"], at_rest["token_usage"]) == (0, 0)
        assert at_rest["cache_hit_rate"] == round(500 / 501, 4)
        gauges = wait_for(
            lambda: next((s for s in [series(pair.prefill, dp_rank="3")] if not s["sglang:kv_used_tokens"]), None)
        )
        assert gauges is not None
        assert gauges["sglang:kv_evictable_tokens"] == 1001
        assert gauges["sglang:kv_available_tokens"] == gauges["sglang:max_total_num_tokens"] - 1001
        assert gauges["sglang:num_used_tokens"] == 0
        assert gauges["sglang:cache_hit_rate"] == 500 / 501
        for mode, tokens in (("prefill_compute", 1001), ("prefill_cache", 500)):
            assert series(pair.prefill, dp_rank="3", mode=mode)["sglang:realtime_tokens_total"] == tokens
        for engine in (pair.prefill, pair.decode):
            assert series(engine, cache_source="device")["sglang:cached_tokens_total"] == 500
            assert series(engine, is_streaming="false")["sglang:prompt_tokens_total"] == 1501
        on_decode = series(pair.decode, dp_rank="0")
        assert (on_decode["sglang:kv_evictable_tokens"], on_decode["sglang:cache_hit_rate"]) == (0, 0)


def test_cache_evicts_the_least_recently_used() -> None:
    """A rank of 1500 tokens keeps one prompt of a thousand."""
    other = TEXT[::-1]
    with run_pair("0.5.23", "--max-total-tokens", "1500") as pair:
        cached = [ask(pair, 0, text)[0]["cached_tokens"] for text in (TEXT, TEXT, other, TEXT)]

    assert cached == [0, 999, 0, 0]


def test_cache_can_be_switched_off() -> None:
    """Every prompt is computed from its beginning then, and /server_info reports it; a decode engine always does so."""
    with run_pair("0.5.23", "--disable-radix-cache") as pair:
        assert [ask(pair, 0, TEXT)[0]["cached_tokens"] for _ in range(2)] == [0, 0]
        assert load(pair.prefill, 0)["total_prefill_uncached_tokens"] == 2000
        assert httpx.get(f"{pair.prefill.url}/server_info").json()["disable_radix_cache"] is True


def test_server_info_reports_the_cache(pair: Pair) -> None:
    """Values are as recorded of real engines; the batch without chunks is not divided among the ranks."""
    prefill, decode = (httpx.get(f"{engine.url}/server_info").json() for engine in (pair.prefill, pair.decode))

    assert (prefill["disable_radix_cache"], decode["disable_radix_cache"]) == (False, True)
    assert (prefill["chunked_prefill_size"], prefill["max_prefill_tokens"]) == (8192 // 4, 16384)
    assert decode["chunked_prefill_size"] == 8192 // 2


def test_decode_reports_its_output_rate() -> None:
    """It does so while a rank runs, not when it rests; /v1/loads and /metrics agree."""
    with EngineProcess("decode", 2, *FAST, "--decode-log-interval", "2") as engine:

        def rates() -> list[float]:
            gauges = [series(engine, dp_rank=str(rank))["sglang:gen_throughput"] for rank in (0, 1)]
            return [*gauges, *(load(engine, rank)["gen_throughput"] for rank in (0, 1))]

        body = {"text": "hello", "bootstrap_host": "2.2.2.2", "bootstrap_room": 5, "stream": True, "rid": "long"}
        body |= {"routed_dp_rank": 1, "sampling_params": {"max_new_tokens": 1_000_000}}
        with httpx.stream("POST", f"{engine.url}/generate", json=body, timeout=30):
            wait_for(lambda: [rate > 0 for rate in rates()] == [False, True, False, True])
        httpx.post(f"{engine.url}/abort_request", json={"rid": "long"})
        wait_for(lambda: rates() == [0, 0, 0, 0])


@pytest.fixture(scope="module")
def reporting() -> Iterator[EngineProcess]:
    """Run a unified engine that reports cached tokens to every client."""
    with EngineProcess("unified", 1, *FAST, "--enable-cache-report") as engine:
        yield engine


def post(engine: EngineProcess, path: str, **body: Any) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(engine.url + path, json=body).raise_for_status().json()
    return answer


def test_next_turn_finds_the_conversation_in_the_cache(reporting: EngineProcess) -> None:
    """The next turn finds the last one's prompt: its messages, and the head of the answer that it now has."""
    messages = [{"role": "system", "content": "s" * 400}, {"role": "user", "content": "u" * 40}]
    path = "/v1/chat/completions"
    first = post(reporting, path, messages=messages, max_tokens=2)["usage"]
    messages += [{"role": "assistant", "content": "the ranks"}, {"role": "user", "content": "go on"}]
    second = post(reporting, path, messages=messages, max_tokens=2)["usage"]

    assert (first["prompt_tokens"], first["prompt_tokens_details"]) == (4 + 100 + 4 + 10 + 3, {"cached_tokens": 0})
    assert second["prompt_tokens_details"] == {"cached_tokens": first["prompt_tokens"]}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (
            "/v1/completions",
            {"prompt": ["c" * 80, "d" * 40], "max_tokens": 1, "n": 2},
            {"prompt_tokens": 30, "prompt_tokens_details": {"cached_tokens": 19 + 9}},
        ),
        (
            "/v1/completions",
            {"prompt": [*range(300, 340)], "max_tokens": 1},
            {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 39}},
        ),
        (
            "/v1/responses",
            {"input": "r" * 80, "max_output_tokens": 1},
            {"input_tokens": 27, "input_tokens_details": {"cached_tokens": 26, "cache_write_tokens": 0}},
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "m" * 80}], "max_tokens": 1},
            {"input_tokens": 1, "cache_read_input_tokens": 26},
        ),
    ],
    ids=["completions, a batch", "completions, token ids", "responses", "messages"],
)
def test_usage_reports_cached_tokens_in_every_api(
    reporting: EngineProcess, path: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Each API has its own names, if the engine was started to report them."""
    post(reporting, path, **body)
    usage = post(reporting, path, **body)["usage"]

    assert expected.items() <= usage.items()


def test_same_image_is_the_same_tokens(reporting: EngineProcess) -> None:
    """Another image is not."""
    asked = []
    for name in ("cat", "cat", "dog"):
        image = {"type": "image_url", "image_url": {"url": f"data:{name}"}}
        content = [{"type": "text", "text": "look!"}, image]
        messages = [{"role": "user", "content": content}]
        asked.append(post(reporting, "/v1/chat/completions", messages=messages, max_tokens=1)["usage"])

    head = 4 + 2
    assert [usage["prompt_tokens"] for usage in asked] == [head + 256 + 3] * 3
    assert asked[1]["prompt_tokens_details"] == {"cached_tokens": head + 256 + 2}
    assert asked[2]["prompt_tokens_details"] == {"cached_tokens": head}


def test_older_releases_count_cached_tokens_without_a_source() -> None:
    """The label came with 0.5.10."""
    with EngineProcess("unified", 1, *FAST, "--sglang-version", "0.5.8") as engine:
        for _ in range(2):
            post(engine, "/generate", text=TEXT)
        text = httpx.get(f"{engine.url}/metrics").text

    assert 'sglang:cached_tokens_total{engine_type="unified",model_name="strict-engine"} 999.0' in text
