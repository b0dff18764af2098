"""The readers and the adapter of vLLM, on pages as vLLM prints them."""

import pytest

from dp_extproc.config import ConfigError, parse_config
from dp_extproc.engines.agreement import disagreement
from dp_extproc.engines.listener import FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, Kind, Mode, Role, Version
from dp_extproc.engines.model_cards import read_cards
from dp_extproc.engines.pages import ReaderError
from dp_extproc.engines.vllm.adapter import capabilities, diagnostics
from dp_extproc.engines.vllm.pages import facts_of, read_version, read_vllm_metrics
from dp_extproc.request.path import Api


def page(*engines: str, cache: str = 'block_size="16",num_gpu_blocks="1000",enable_prefix_caching="True"') -> bytes:
    lines = [
        "# HELP vllm:num_requests_running Number of requests in model execution batches.",
        "# TYPE vllm:num_requests_running gauge",
    ]
    for number, engine in enumerate(engines):
        own = f'engine="{engine}",model_name="m"'
        lines += [
            f"vllm:num_requests_running{{{own}}} {number + 1}.0",
            f"vllm:num_requests_waiting{{{own}}} {number + 2}.0",
            f'vllm:num_requests_waiting_by_reason{{{own},reason="capacity"}} 77.0',
            f"vllm:kv_cache_usage_perc{{{own}}} 0.{number + 1}",
            f"vllm:prompt_tokens_total{{{own}}} 100.0",
            f"vllm:prompt_tokens_created{{{own}}} 1.78e+09",
            f'vllm:cache_config_info{{{cache},engine="{engine}"}} 1.0',
            f'vllm:e2e_request_latency_seconds_bucket{{{own},le="1.0"}} 4.0',
        ]
    return "\n".join(lines).encode() + b"\n"


def facts(version: str = "0.11.0", ranks: int = 2) -> EngineFacts:
    return facts_of(version, read_cards(b'{"data":[{"id":"m"}]}', "vLLM"), page(*map(str, range(ranks))))


def test_metrics_have_a_sample_for_each_engine_label() -> None:
    """Used tokens are the share of the cache times its size; series by reason are not added."""
    load = read_vllm_metrics(page("0", "1"))

    ranks = [(each.dp_rank, each.used_tokens, each.running_requests, each.waiting_requests) for each in load.ranks]
    assert ranks == [(0, 1600, 1, 2), (1, 3200, 2, 3)]
    assert [each.capacity_tokens for each in load.ranks] == [16000, 16000]
    assert load.prompt_tokens == 200


def test_ranks_are_counted_from_zero_on_each_node() -> None:
    """With hybrid balancing labels count the ranks of all nodes, and requests those of one node."""
    load = read_vllm_metrics(page("10", "8", "9"))

    assert [(each.dp_rank, each.running_requests) for each in load.ranks] == [(0, 2), (1, 3), (2, 1)]


@pytest.mark.parametrize(
    ("cache", "capacity"),
    [
        pytest.param('block_size="16",num_gpu_blocks="661",kv_cache_size_tokens="10576"', 10576, id="told"),
        pytest.param('block_size="16",num_gpu_blocks="None"', None, id="unknown"),
        pytest.param('num_gpu_blocks="10"', None, id="half"),
    ],
)
def test_capacity_is_the_size_of_the_cache(cache: str, capacity: int | None) -> None:
    """Without it on the page there are requests, and no tokens."""
    (rank,) = read_vllm_metrics(page("0", cache=cache)).ranks

    assert rank.capacity_tokens == capacity
    assert rank.used_tokens == round(0.1 * (capacity or 0))
    assert rank.running_requests == 1


def test_facts_are_put_together_from_three_pages() -> None:
    """They are version, model, ranks and prefix cache."""
    found = facts_of(
        read_version(b'{"version":"0.11.1rc2.dev3+gabc"}'), read_cards(b'{"data":[{"id":"m"}]}', "vLLM"), page("0")
    )

    assert (found.kind, found.version, found.dp_ranks, found.served_model) == (Kind.VLLM, Version(0, 11, 1), 1, "m")
    assert (found.mode, found.prefix_cache, found.follows_rooms) == (Mode.UNIFIED, True, False)
    assert not facts_of("1", (), page("0", cache='enable_prefix_caching="False"')).prefix_cache


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"sglang:num_running_reqs 1\n", id="another engine's"),
        pytest.param(b'vllm:num_requests_running{engine="x"} 1\n', id="a strange rank"),
        pytest.param(b'vllm:num_requests_running{engine="0"} NaN\n', id="no number"),
    ],
)
def test_pages_of_another_shape_are_refused(text: bytes) -> None:
    """The failure kind is that of a wrong shape."""
    with pytest.raises(ReaderError) as caught:
        read_vllm_metrics(text)
    assert caught.value.kind is FailureKind.WRONG_SHAPE


@pytest.mark.parametrize(
    ("version", "ranks", "by_header", "codes"),
    [
        pytest.param("0.11.0", 2, {Api.COMPLETIONS, Api.CHAT}, set(), id="reads the header"),
        pytest.param("0.10.2", 2, set[Api](), {"rank_not_carried"}, id="does not yet"),
        pytest.param("0.10.2", 1, set[Api](), set(), id="one rank"),
        pytest.param("0.11.0", 1, set[Api](), set(), id="port per rank"),
        pytest.param("dev", 2, {Api.COMPLETIONS, Api.CHAT}, {"unknown_version"}, id="unknown"),
    ],
)
def test_rank_is_sent_as_a_header_where_the_release_reads_it(
    version: str, ranks: int, by_header: set[Api], codes: set[str]
) -> None:
    """The path /generate is not served."""
    engine = facts(version, ranks)
    takes = capabilities(engine)

    assert takes.rank_header_on == by_header
    assert {api for api in Api if takes.serves(api)} == set(Api) - {Api.GENERATE}
    assert {diagnostic.code for diagnostic in diagnostics(engine, Role.WORKER)} == codes


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_vllm_cannot_be_used_in_a_disaggregated_pool(role: Role) -> None:
    """Both the diagnostic and the disagreement give the reason."""
    (diagnostic,) = diagnostics(facts(), role)
    failure = disagreement(Endpoint("http://h:1", "h", 1, "m", role), facts())

    assert (diagnostic.code, diagnostic.unusable) == ("vllm_disaggregated", True)
    assert failure is not None
    assert "prefill before decode" in failure.message


def test_configuration_refuses_vllm_in_a_disaggregated_pool() -> None:
    """The error gives the reason."""
    text = 'pools: [{models: [m], engine: vllm, prefill: {endpoints: ["http://a:1"]}, decode: {endpoints: ["http://b:1"]}}]'
    with pytest.raises(ConfigError, match="run prefill before decode") as caught:
        parse_config(text)
    assert "workers" in str(caught.value)
