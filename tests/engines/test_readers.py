"""The readers of /v1/loads, /metrics and /server_info, on recorded pages and on any other bytes."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_extproc.engines.listener import FailureKind
from dp_extproc.engines.model import DecodeSteps, LoadPage, Mode, PrefillSteps, RankSample, Version, parse_version
from dp_extproc.engines.pages import ReaderError
from dp_extproc.engines.sglang.load_pages import read_loads, read_metrics
from dp_extproc.engines.sglang.server_info import follows_rooms, read_server_info

RECORDED = Path(__file__).parent / "recorded"
NOON = datetime(2026, 9, 10, 12, tzinfo=UTC)


def recorded(name: str) -> bytes:
    return (RECORDED / name).read_bytes()


def loads(*ranks: dict[str, Any], **page: Any) -> bytes:
    return json.dumps({"timestamp": NOON.isoformat(), "loads": ranks} | page).encode()


def rank(index: int, used: int = 0, **fields: Any) -> dict[str, Any]:
    return {"dp_rank": index, "num_used_tokens": used} | fields


class TestLoads:
    """GET /v1/loads."""

    def test_loads_of_a_busy_engine_have_everything_that_it_reports(self) -> None:
        """The page was recorded under load, with two ranks."""
        page = read_loads(recorded("dp2_underload/loads.json"))

        assert page.ranks[0].age == pytest.approx(0.1939, abs=1e-4)
        assert page.ranks[1] == RankSample(
            dp_rank=1,
            used_tokens=669,
            total_tokens=830,
            waiting_uncached_tokens=page.ranks[1].waiting_uncached_tokens,
            running_requests=4,
            waiting_requests=4,
            capacity_tokens=4096,
            max_running_requests=4,
            tokens_per_second=184.99,
            decoded=DecodeSteps(steps=139, sequences=538, seconds=2.704994, tokens=538),
            prefilled=PrefillSteps(tokens=153, seconds=0.197113),
            age=pytest.approx(0.2535, abs=1e-4),  # type: ignore[arg-type]
        )

    @pytest.mark.parametrize("name", ["dp2/loads.json", "pd_dpattn/prefill_loads.json", "pd_dpattn/decode_loads.json"])
    def test_loads_have_age_and_capacity_on_each_recorded_page(self, name: str) -> None:
        """Each page has ranks 0 and 1."""
        page = read_loads(recorded(name))

        assert [(s.dp_rank, s.capacity_tokens) for s in page.ranks] == [(0, 8192), (1, 8192)]
        assert all(s.age is not None and 0 <= s.age < 1 for s in page.ranks)

    def test_loads_of_the_first_release_lack_later_fields(self) -> None:
        """The page of 0.5.8 also has totals; a field that it lacks is None."""
        page = read_loads(
            loads(
                rank(0, 17, num_running_reqs=2, num_waiting_reqs=1, max_total_num_tokens=900, num_total_reqs=3),
                dp_rank_count=1,
                aggregate={"total_running_reqs": 2},
            )
        )

        assert page == LoadPage(ranks=(RankSample(0, 17, running_requests=2, waiting_requests=1, capacity_tokens=900),))

    def test_loads_have_no_sample_of_a_rank_that_never_published(self) -> None:
        """A time stamp of 0.0 means that the numbers beside it are no sample."""
        page = read_loads(loads(rank(0, timestamp=0.0), rank(1, 5, timestamp=NOON.timestamp())))

        assert [s.dp_rank for s in page.ranks] == [1]
        assert page.unpublished_ranks == (0,)

    def test_loads_have_no_negative_age(self) -> None:
        """A rank that published after the page took its own time stamp is 0 s old."""
        page = read_loads(loads(rank(0, timestamp=NOON.timestamp() + 3)))

        assert page.ranks[0].age == 0.0

    @pytest.mark.parametrize("timestamp", [None, "yesterday", "", "2026-99-99T00:00:00"])
    def test_loads_have_no_age_without_a_time_of_the_page(self, timestamp: str | None) -> None:
        """The samples count, with an unknown age."""
        page = read_loads(loads(rank(0, 4, timestamp=NOON.timestamp()), timestamp=timestamp))

        assert page.ranks == (RankSample(0, 4),)

    def test_loads_take_a_time_without_zone_as_utc(self) -> None:
        """Some releases print the time without an offset."""
        stamp = NOON.replace(tzinfo=None).isoformat()
        page = read_loads(loads(rank(0, timestamp=NOON.timestamp() - 2), timestamp=stamp))

        assert page.ranks[0].age == 2.0

    def test_loads_keep_the_newest_entry_of_a_rank(self) -> None:
        """Of several entries for one rank the one published last counts."""
        now = NOON.timestamp()
        page = read_loads(
            loads(rank(0, 1, timestamp=now - 5), rank(0, 2, timestamp=now), rank(0, 3, timestamp=now - 9))
        )

        assert [s.used_tokens for s in page.ranks] == [2]

    @pytest.mark.parametrize(
        "moments", [None, 5, "sextet", [], [1.0] * 5, [1.0] * 7, ["a"] * 6, [[1]] * 6, {"n": 1}, [True] * 6]
    )
    def test_loads_leave_out_decode_steps_in_another_form(self, moments: object) -> None:
        """The rest of the page counts."""
        page = read_loads(loads(rank(0, 7, decode_moments=moments)))

        assert page.ranks == (RankSample(0, 7),)

    @pytest.mark.parametrize(
        "moments",
        [
            [5e-324, 1, 1e6, 0, 0, 1],
            [1.7e308, 1, 1e6, 0, 0, 1],
            [1, 1.5, 1e6, 0, 0, 1],
            [1, 1, -1e6, 0, 0, 1],
            [1, 1, 1e6, 0, 0, 1 << 53],
            [10**400] * 6,
        ],
    )
    def test_loads_refuse_impossible_counts_of_decode_steps(self, moments: list[float]) -> None:
        """Counts are whole, finite and not negative; the error names the count."""
        with pytest.raises(ReaderError, match=r"/v1/loads says .* of decode_moments") as refusal:
            read_loads(loads(rank(0, 7, decode_moments=moments)))

        assert refusal.value.kind is FailureKind.WRONG_SHAPE

    def test_loads_ignore_the_size_of_sums_of_squares(self) -> None:
        """They are not used, and after months they exceed the bound of all other numbers."""
        page = read_loads(loads(rank(0, 7, decode_moments=[10.0, 20.0, 3e5, 1e300, 1e300, 20.0])))

        assert page.ranks[0].decoded == DecodeSteps(10.0, 20.0, 0.3, 20.0)

    def test_loads_count_requests_in_transfer_as_running(self) -> None:
        """SGLang lists the requests of a prefill rank whose KV cache is in transfer apart."""
        page = read_loads(
            loads(rank(0, num_running_reqs=0, disaggregation={"mode": "prefill", "prefill_inflight_queue_reqs": 3}))
        )

        assert page.ranks[0].running_requests == 3

    def test_loads_raise_a_negative_count_to_zero(self) -> None:
        """Counts below zero are an artefact of the engine's own bookkeeping."""
        assert read_loads(loads(rank(0, -1, num_total_tokens=-1))).ranks == (RankSample(0, 0, 0),)

    @pytest.mark.parametrize(
        ("page", "kind"),
        [
            pytest.param(b"", FailureKind.UNREADABLE, id="empty"),
            pytest.param(b"<html>", FailureKind.UNREADABLE, id="html"),
            pytest.param(b'{"loads":[', FailureKind.UNREADABLE, id="cut-off"),
            pytest.param(b'{"x":' + b"[" * 100_000, FailureKind.UNREADABLE, id="nested"),
            pytest.param(b"[]", FailureKind.WRONG_SHAPE, id="list"),
            pytest.param(b"{}", FailureKind.WRONG_SHAPE, id="no-loads"),
            pytest.param(b'{"loads":[{"dp_rank":0}]}', FailureKind.WRONG_SHAPE, id="no-used-tokens"),
            pytest.param(
                b'{"loads":[{"dp_rank":-1,"num_used_tokens":1}]}', FailureKind.WRONG_SHAPE, id="negative-rank"
            ),
            pytest.param(b'{"loads":[{"dp_rank":0,"num_used_tokens":"9"}]}', FailureKind.WRONG_SHAPE, id="string"),
            pytest.param(
                b'{"loads":[{"dp_rank":0,"num_used_tokens":%b}]}' % (b"9" * 1000),
                FailureKind.WRONG_SHAPE,
                id="astronomic",
            ),
        ],
    )
    def test_a_page_of_another_shape_is_refused(self, page: bytes, kind: FailureKind) -> None:
        """The error separates malformed pages from well-formed pages of another shape."""
        with pytest.raises(ReaderError, match="/v1/loads") as refusal:
            read_loads(page)

        assert refusal.value.kind is kind


class TestMetrics:
    """GET /metrics."""

    def test_metrics_of_a_busy_engine_have_ranks_and_prompt_tokens(self) -> None:
        """The page was recorded under load, with two ranks."""
        page = read_metrics(recorded("dp2_underload/metrics.txt"))

        assert [rank.tokens_per_second for rank in page.ranks] == pytest.approx([104.12, 184.99], abs=0.01)
        assert replace(page, ranks=tuple(replace(rank, tokens_per_second=None) for rank in page.ranks)) == LoadPage(
            ranks=(
                RankSample(0, 376, running_requests=2, waiting_requests=0, capacity_tokens=4096),
                RankSample(1, 577, running_requests=4, waiting_requests=4, capacity_tokens=4096),
            ),
            prompt_tokens=58,
            cached_prompt_tokens=0,
        )

    def test_metrics_add_up_cached_tokens_of_all_sources(self) -> None:
        """From 0.5.9 on each cache source has a series, and a page without prompts has no count."""
        page = b"""sglang:prompt_tokens_total{is_streaming="true"} 500.0
sglang:cached_tokens_total{cache_source="device"} 200.0
sglang:cached_tokens_total{cache_source="host"} 30.0
"""
        assert read_metrics(page).cached_prompt_tokens == 230
        assert read_metrics(page.partition(b"\n")[2]).cached_prompt_tokens is None

    def test_metrics_add_up_prompt_tokens_of_all_series(self) -> None:
        """The counter is split by is_streaming; both parts belong to the total of the engine."""
        assert read_metrics(recorded("pd_dpattn/decode_metrics.txt")).prompt_tokens == 253 + 120

    def test_metrics_of_prefill_count_its_queues(self) -> None:
        """On prefill, requests in bootstrap wait and requests in transfer run."""
        ranks = read_metrics(recorded("constructed/metrics-prefill-sample.txt")).ranks

        assert [s.dp_rank for s in ranks] == [0, 1, 2, 3]
        assert ranks[3] == RankSample(3, 40960, running_requests=4, waiting_requests=6, capacity_tokens=440000)

    def test_metrics_of_decode_count_its_queues(self) -> None:
        """On decode, requests that wait for memory or for their KV cache wait."""
        ranks = read_metrics(recorded("constructed/metrics-decode-sample.txt")).ranks

        assert ranks[2] == RankSample(2, 401408, running_requests=33, waiting_requests=8, capacity_tokens=440000)

    def test_metrics_may_have_underscores_instead_of_colons(self) -> None:
        """Some collectors rename the series."""
        page = recorded("dp2_underload/metrics.txt")

        assert read_metrics(page.replace(b"sglang:", b"sglang_")) == read_metrics(page)

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            pytest.param(["num_used_tokens 7"], [(0, 7)], id="no-labels"),
            pytest.param(['num_used_tokens{tp_rank="0"} 7'], [(0, 7)], id="no-dp-rank"),
            pytest.param(
                ['num_used_tokens{dp_rank="1",tp_rank="2"} 7', 'num_used_tokens{dp_rank="1",tp_rank="3"} 6'],
                [(1, 7)],
                id="several-schedulers",
            ),
            pytest.param(
                ['num_used_tokens{dp_rank="0",pp_rank="0"} 7', 'num_used_tokens{dp_rank="0",pp_rank="1"} 9'],
                [(0, 7)],
                id="pipeline-ranks",
            ),
            pytest.param(
                ['num_used_tokens{priority=""} 7', 'num_used_tokens{priority="1"} 9'], [(0, 7)], id="priorities"
            ),
            pytest.param(['num_used_tokens{dp_rank="0"} 1.5e3'], [(0, 1500)], id="exponent"),
            pytest.param(['num_used_tokens{dp_rank="0"} -2'], [(0, 0)], id="negative"),
            pytest.param(['num_used_tokens{a="}\\"{ ",dp_rank="2"} 3'], [(2, 3)], id="odd-label-value"),
            pytest.param(['num_used_tokens_more{dp_rank="0"} 3', "num_used_tokens 1"], [(0, 1)], id="longer-name"),
        ],
    )
    def test_metrics_are_grouped_by_rank(self, lines: list[str], expected: list[tuple[int, int]]) -> None:
        """Of several series of one rank the maximum counts, on the first pipeline rank."""
        page = read_metrics("".join(f"sglang:{line}\n" for line in lines).encode())

        assert [(s.dp_rank, s.used_tokens) for s in page.ranks] == expected

    def test_metrics_count_a_queue_with_two_names_once(self) -> None:
        """The bootstrap queue had another name before 0.5.11; a page may have both."""
        lines = ["num_used_tokens 1", "num_prefill_bootstrap_queue_reqs 4", "num_prefill_prealloc_queue_reqs 4"]
        page = read_metrics("".join(f"sglang:{line}\n" for line in lines).encode())

        assert page.ranks[0].waiting_requests == 4

    def test_metrics_have_no_sample_of_a_rank_without_usage(self) -> None:
        """After its start a rank has only constants on the page."""
        page = read_metrics(b'sglang:max_total_num_tokens{dp_rank="1"} 8\n')

        assert page == LoadPage(ranks=(), unpublished_ranks=(1,))

    def test_metrics_may_have_no_ranks(self) -> None:
        """A page of SGLang without any of the gauges is readable, and empty."""
        assert read_metrics(b"# TYPE sglang:e2e_request_latency_seconds histogram\n") == LoadPage(ranks=())

    @pytest.mark.parametrize(
        ("page", "kind"),
        [
            pytest.param(b"", FailureKind.WRONG_SHAPE, id="empty"),
            pytest.param(b"vllm:num_requests_running 3\n", FailureKind.WRONG_SHAPE, id="vllm"),
            pytest.param(b"sglang:num_used_tokens{\n", FailureKind.UNREADABLE, id="cut-off"),
            pytest.param(b"sglang:num_used_tokens x\n", FailureKind.UNREADABLE, id="no-number"),
            pytest.param(b"sglang:num_used_tokens NaN\n", FailureKind.WRONG_SHAPE, id="nan"),
            pytest.param(b"sglang:num_used_tokens +Inf\n", FailureKind.WRONG_SHAPE, id="infinite"),
            pytest.param(b"sglang:num_used_tokens " + b"9" * 1000, FailureKind.WRONG_SHAPE, id="astronomic"),
            pytest.param(b'sglang:num_used_tokens{dp_rank="x"} 1\n', FailureKind.WRONG_SHAPE, id="rank-x"),
            pytest.param(b'sglang:num_used_tokens{dp_rank="-1"} 1\n', FailureKind.WRONG_SHAPE, id="rank-negative"),
            pytest.param(b'sglang:num_used_tokens{a="\xff"} 1\n', FailureKind.UNREADABLE, id="not-utf-8"),
            pytest.param(b"sglang:num_used_tokens " + b"9" * 5000, FailureKind.WRONG_SHAPE, id="long-line"),
            pytest.param(b"sglang:num_used_tokens 1\n" * 50_000, FailureKind.WRONG_SHAPE, id="many-lines"),
        ],
    )
    def test_a_page_of_another_shape_is_refused(self, page: bytes, kind: FailureKind) -> None:
        """The error separates malformed pages from well-formed pages of another shape."""
        with pytest.raises(ReaderError, match="/metrics") as refusal:
            read_metrics(page)

        assert refusal.value.kind is kind


class TestServerInfo:
    """GET /server_info."""

    @pytest.mark.parametrize(
        ("name", "mode", "attention", "port", "follows"),
        [
            ("dp2/server_info.json", Mode.UNIFIED, False, 8998, False),
            ("dpattn/server_info.json", Mode.UNIFIED, True, 8998, False),
            ("pd_dpattn/prefill_server_info.json", Mode.PREFILL, True, 31198, True),
            ("pd_dpattn/decode_server_info.json", Mode.DECODE, True, 8998, False),
            ("pd_plaindp/prefill_server_info.json", Mode.PREFILL, False, 31198, True),
        ],
    )
    def test_server_info_of_recorded_engines(
        self, name: str, mode: Mode, attention: bool, port: int, follows: bool
    ) -> None:
        """Every recorded engine has two ranks, in one or the other of two sizes."""
        facts = read_server_info(recorded(name))

        assert (facts.version, facts.dp_ranks, facts.served_model) == (Version(0, 5, 23), 2, "tiny")
        assert (facts.mode, facts.dp_attention, facts.bootstrap_port) == (mode, attention, port)
        assert facts.follows_rooms is follows
        assert facts.metrics_enabled is True

    def test_server_info_of_an_old_release_lacks_newer_keys(self) -> None:
        """Ranks are those of dp_size, and the bootstrap port is SGLang's default."""
        facts = read_server_info(
            b'{"version":"0.5.5","dp_size":4,"enable_dp_attention":true,"disaggregation_mode":"prefill",'
            b'"model_path":"/m","served_model_name":null,"internal_states":[{"x":1}]}'
        )

        assert (facts.dp_ranks, facts.dp_attention, facts.bootstrap_port, facts.served_model) == (4, True, 8998, "/m")

    @pytest.mark.parametrize("version", ["0.0.0.dev0", "main", "", None, 5, 0.5, ["0.5.23"], {"a": 1}])
    def test_server_info_counts_without_a_version(self, version: object) -> None:
        """The rest of the page counts, and rooms are followed as by the newest release."""
        page = {"dp_size": 4, "disaggregation_mode": "prefill", "version": version}
        facts = read_server_info(json.dumps(page).encode())

        assert (facts.version, facts.dp_ranks, facts.mode) == (None, 4, Mode.PREFILL)
        assert facts.follows_rooms

    def test_server_info_has_the_role_that_was_switched_to(self) -> None:
        """With --enable-pd-role-switch the role is that of the schedulers, not of the launch arguments."""
        facts = read_server_info(
            b'{"dp_size":1,"disaggregation_mode":"prefill","enable_pd_role_switch":true,'
            b'"internal_states":[{"disaggregation_mode":"decode"}]}'
        )

        assert (facts.mode, facts.role_can_switch) == (Mode.DECODE, True)

    @pytest.mark.parametrize(
        ("text", "version"),
        [
            ("0.5.23", Version(0, 5, 23)),
            ("0.5.10.post1", Version(0, 5, 10)),
            ("0.5.23rc1", Version(0, 5, 23)),
            ("0.5.11.dev3+g0123abc", Version(0, 5, 11)),
            ("v0.4.6", Version(0, 4, 6)),
            ("1.0.0", Version(1, 0, 0)),
            ("0.5.24rc1", Version(0, 5, 24)),
            ("0.5.23+cu128", Version(0, 5, 23)),
            (" 0.5.23\n", Version(0, 5, 23)),
            ("0.0.0", None),
            ("0.0.0.dev0", None),
            ("0.0.0.dev1+g0123abc", None),
            ("0.0.0+local", None),
            ("v0.0.1", None),
            ("0.1.dev1+g0123abc", None),
            ("main", None),
            ("0.5", None),
            ("unknown", None),
            ("", None),
            (None, None),
            ("0.5." + "9" * 5000, None),
        ],
    )
    def test_version_is_the_release_of_a_text(self, text: str | None, version: Version | None) -> None:
        """Suffixes do not count; a text without a release is None."""
        assert parse_version(text) == version

    @pytest.mark.parametrize(
        ("version", "mode", "method", "follows"),
        [
            pytest.param(Version(0, 5, 7), Mode.PREFILL, "round_robin", True, id="0.5.7-prefill"),
            pytest.param(Version(0, 5, 7), Mode.DECODE, "round_robin", True, id="0.5.7-decode"),
            pytest.param(Version(0, 5, 7), Mode.UNIFIED, "round_robin", False, id="0.5.7-unified"),
            pytest.param(Version(0, 5, 9), Mode.PREFILL, "round_robin", True, id="0.5.9-prefill-forced"),
            pytest.param(Version(0, 5, 9), Mode.DECODE, "auto", False, id="0.5.9-decode"),
            pytest.param(Version(0, 5, 9), Mode.DECODE, "follow_bootstrap_room", True, id="0.5.9-decode-follows"),
            pytest.param(Version(0, 5, 10), Mode.PREFILL, "auto", True, id="0.5.10-prefill"),
            pytest.param(Version(0, 5, 10), Mode.PREFILL, "round_robin", False, id="0.5.10-prefill-round-robin"),
            pytest.param(Version(0, 5, 23), Mode.DECODE, "round_robin", False, id="0.5.23-decode"),
            pytest.param(None, Mode.PREFILL, None, True, id="unknown-prefill"),
            pytest.param(None, Mode.PREFILL, "total_tokens", False, id="unknown-prefill-total-tokens"),
        ],
    )
    def test_following_of_rooms_depends_on_release_role_and_method(
        self, version: Version | None, mode: Mode, method: str | None, follows: bool
    ) -> None:
        """Prefill follows rooms by default; before 0.5.8 decode does, too."""
        assert follows_rooms(version, mode, method) is follows

    @pytest.mark.parametrize(
        ("page", "kind"),
        [
            pytest.param(b"", FailureKind.UNREADABLE, id="empty"),
            pytest.param(b"null", FailureKind.WRONG_SHAPE, id="null"),
            pytest.param(b"{}", FailureKind.WRONG_SHAPE, id="no-dp-size"),
            pytest.param(b'{"dp_size":0}', FailureKind.WRONG_SHAPE, id="zero"),
            pytest.param(b'{"dp_size":4096,"attn_dp_size":4096}', FailureKind.WRONG_SHAPE, id="huge"),
            pytest.param(b'{"dp_size":1,"disaggregation_mode":"mixed"}', FailureKind.WRONG_SHAPE, id="mode"),
            pytest.param(
                b'{"dp_size":1,"enable_pd_role_switch":true,"internal_states":7}', FailureKind.WRONG_SHAPE, id="states"
            ),
        ],
    )
    def test_a_page_of_another_shape_is_refused(self, page: bytes, kind: FailureKind) -> None:
        """The error separates malformed pages from well-formed pages of another shape."""
        with pytest.raises(ReaderError, match="/server_info") as refusal:
            read_server_info(page)

        assert refusal.value.kind is kind


READERS = [
    pytest.param(read_loads, "dp2_underload/loads.json", id="loads"),
    pytest.param(read_metrics, "constructed/metrics-decode-sample.txt", id="metrics"),
    pytest.param(read_server_info, "pd_dpattn/prefill_server_info.json", id="server_info"),
]

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _reads_or_refuses(read: Callable[[bytes], object], page: bytes) -> None:
    try:
        result = read(page)
    except ReaderError:
        return
    if isinstance(result, LoadPage):
        ranks = [sample.dp_rank for sample in result.ranks]
        assert ranks == sorted(set(ranks))
        assert not set(ranks) & set(result.unpublished_ranks)
        assert all(sample.used_tokens >= 0 and (sample.age is None or sample.age >= 0) for sample in result.ranks)


@pytest.mark.parametrize(("read", "name"), READERS)
class TestAnyBytes:
    """Whatever the bytes are, a reader returns data or raises a ReaderError."""

    @given(page=st.binary(max_size=400))
    @settings(max_examples=200, deadline=None)
    def test_random_bytes_are_read_or_refused(self, read: Callable[[bytes], object], name: str, page: bytes) -> None:
        """No other exception leaves a reader."""
        _reads_or_refuses(read, page)

    @given(data=st.data())
    @settings(max_examples=300, deadline=None)
    def test_a_mutated_page_is_read_or_refused(
        self, read: Callable[[bytes], object], name: str, data: st.DataObject
    ) -> None:
        """A stretch of a real page is replaced, removed or repeated."""
        page = recorded(name)
        start = data.draw(st.integers(0, len(page)))
        length = data.draw(st.integers(0, 60))
        patch = data.draw(
            st.binary(max_size=12)
            | st.sampled_from([b"null", b"-1", b"1e999", b"NaN", b'"', b"\\", b"{", b"\n", b"9" * 30])
        )
        _reads_or_refuses(read, page[:start] + patch + page[start + length :])

    @given(key=st.integers(0, 40), value=JSON_VALUES)
    @settings(max_examples=200, deadline=None)
    def test_a_page_with_a_value_of_another_type_is_read_or_refused(
        self, read: Callable[[bytes], object], name: str, key: int, value: object
    ) -> None:
        """One value of a real page is replaced by any JSON."""
        if not name.endswith(".json"):
            _reads_or_refuses(read, f'sglang:num_used_tokens{{dp_rank="{value}"}} {value}\n'.encode(errors="replace"))
            return
        body = json.loads(recorded(name))
        target = body["loads"][0] if "loads" in body else body
        names = sorted(target, key=lambda each: (each not in {"dp_size", "version", "timestamp"}, each))
        target[names[key % len(names)]] = value
        _reads_or_refuses(read, json.dumps(body).encode(errors="replace"))
