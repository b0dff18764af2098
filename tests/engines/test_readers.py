"""The readers of /v1/loads, /metrics and /server_info, on pages of real servers and on anything else."""

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
from dp_extproc.engines.model import DecodeSteps, LoadPage, Mode, RankSample, Version, parse_version
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

    def test_busy_server(self) -> None:
        """A page recorded under load gives both ranks with everything it tells."""
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
            age=pytest.approx(0.2535, abs=1e-4),  # type: ignore[arg-type]
        )

    @pytest.mark.parametrize("name", ["dp2/loads.json", "pd_dpattn/prefill_loads.json", "pd_dpattn/decode_loads.json"])
    def test_every_recorded_page(self, name: str) -> None:
        """Each recorded page gives ranks 0 and 1, with age and capacity."""
        page = read_loads(recorded(name))

        assert [(s.dp_rank, s.capacity_tokens) for s in page.ranks] == [(0, 8192), (1, 8192)]
        assert all(s.age is not None and 0 <= s.age < 1 for s in page.ranks)

    def test_first_version_of_the_page(self) -> None:
        """The page of 0.5.8 lacks later fields and has totals; what it lacks is None."""
        page = read_loads(
            loads(
                rank(0, 17, num_running_reqs=2, num_waiting_reqs=1, max_total_num_tokens=900, num_total_reqs=3),
                dp_rank_count=1,
                aggregate={"total_running_reqs": 2},
            )
        )

        assert page == LoadPage(ranks=(RankSample(0, 17, running_requests=2, waiting_requests=1, capacity_tokens=900),))

    def test_rank_that_never_published(self) -> None:
        """A time stamp of 0.0 means that the numbers beside it are no sample."""
        page = read_loads(loads(rank(0, timestamp=0.0), rank(1, 5, timestamp=NOON.timestamp())))

        assert [s.dp_rank for s in page.ranks] == [1]
        assert page.unpublished_ranks == (0,)

    def test_age_is_never_negative(self) -> None:
        """A rank that published after the page's own time stamp was taken is 0 s old."""
        page = read_loads(loads(rank(0, timestamp=NOON.timestamp() + 3)))

        assert page.ranks[0].age == 0.0

    @pytest.mark.parametrize("timestamp", [None, "yesterday", "", "2026-99-99T00:00:00"])
    def test_page_without_usable_time(self, timestamp: str | None) -> None:
        """Without a time of its own the page gives samples of unknown age."""
        page = read_loads(loads(rank(0, 4, timestamp=NOON.timestamp()), timestamp=timestamp))

        assert page.ranks == (RankSample(0, 4),)

    def test_time_without_zone_is_utc(self) -> None:
        """A page that prints its time without an offset means UTC."""
        stamp = NOON.replace(tzinfo=None).isoformat()
        page = read_loads(loads(rank(0, timestamp=NOON.timestamp() - 2), timestamp=stamp))

        assert page.ranks[0].age == 2.0

    def test_duplicate_rank_keeps_the_newest(self) -> None:
        """Of several entries for one rank the one published last counts."""
        now = NOON.timestamp()
        page = read_loads(
            loads(rank(0, 1, timestamp=now - 5), rank(0, 2, timestamp=now), rank(0, 3, timestamp=now - 9))
        )

        assert [s.used_tokens for s in page.ranks] == [2]

    @pytest.mark.parametrize(
        "moments", [None, 5, "sextet", [], [1.0] * 5, [1.0] * 7, ["a"] * 6, [[1]] * 6, {"n": 1}, [True] * 6]
    )
    def test_counts_of_decode_steps_in_another_form(self, moments: object) -> None:
        """They are left out, and the rest of the page counts."""
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
    def test_counts_of_decode_steps_that_cannot_be(self, moments: list[float]) -> None:
        """Counts are whole, finite and not negative; a page that says otherwise is refused, and says of what."""
        with pytest.raises(ReaderError, match=r"/v1/loads says .* of decode_moments") as refusal:
            read_loads(loads(rank(0, 7, decode_moments=moments)))

        assert refusal.value.kind is FailureKind.WRONG_SHAPE

    def test_sums_of_squares_may_be_of_any_size(self) -> None:
        """Nobody needs them, and those of a server that has run for months are beyond what integers can be told of."""
        page = read_loads(loads(rank(0, 7, decode_moments=[10.0, 20.0, 3e5, 1e300, 1e300, 20.0])))

        assert page.ranks[0].decoded == DecodeSteps(10.0, 20.0, 0.3, 20.0)

    def test_prefill_in_transfer_counts_as_running(self) -> None:
        """A prefill rank counts requests whose KV cache is on its way, which SGLang lists apart."""
        page = read_loads(
            loads(rank(0, num_running_reqs=0, disaggregation={"mode": "prefill", "prefill_inflight_queue_reqs": 3}))
        )

        assert page.ranks[0].running_requests == 3

    def test_slightly_negative_count_is_zero(self) -> None:
        """A count below zero, an artefact of the engine's own bookkeeping, is zero."""
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
    def test_other_bytes(self, page: bytes, kind: FailureKind) -> None:
        """What is no such page is refused, and says whether it is malformed or foreign."""
        with pytest.raises(ReaderError, match="/v1/loads") as refusal:
            read_loads(page)

        assert refusal.value.kind is kind


class TestMetrics:
    """GET /metrics."""

    def test_busy_server(self) -> None:
        """A page recorded under load gives both ranks and the prompt tokens of the whole server."""
        page = read_metrics(recorded("dp2_underload/metrics.txt"))

        assert [rank.tokens_per_second for rank in page.ranks] == pytest.approx([104.12, 184.99], abs=0.01)
        assert replace(page, ranks=tuple(replace(rank, tokens_per_second=None) for rank in page.ranks)) == LoadPage(
            ranks=(
                RankSample(0, 376, running_requests=2, waiting_requests=0, capacity_tokens=4096),
                RankSample(1, 577, running_requests=4, waiting_requests=4, capacity_tokens=4096),
            ),
            prompt_tokens=58,
        )

    def test_prompt_tokens_of_streaming_and_plain_requests_add_up(self) -> None:
        """The counter is split by is_streaming; both parts belong to the server's total."""
        assert read_metrics(recorded("pd_dpattn/decode_metrics.txt")).prompt_tokens == 253 + 120

    def test_prefill_queues(self) -> None:
        """On prefill, requests in bootstrap wait and requests in transfer run."""
        ranks = read_metrics(recorded("constructed/metrics-prefill-sample.txt")).ranks

        assert [s.dp_rank for s in ranks] == [0, 1, 2, 3]
        assert ranks[3] == RankSample(3, 40960, running_requests=4, waiting_requests=6, capacity_tokens=440000)

    def test_decode_queues(self) -> None:
        """On decode, requests that wait for room or for their KV cache wait."""
        ranks = read_metrics(recorded("constructed/metrics-decode-sample.txt")).ranks

        assert ranks[2] == RankSample(2, 401408, running_requests=33, waiting_requests=8, capacity_tokens=440000)

    def test_underscore_names(self) -> None:
        """A page whose names were changed to underscores on the way reads the same."""
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
    def test_labels(self, lines: list[str], expected: list[tuple[int, int]]) -> None:
        """Samples are grouped by dp_rank; of several for one rank the maximum counts, of the first pipeline rank."""
        page = read_metrics("".join(f"sglang:{line}\n" for line in lines).encode())

        assert [(s.dp_rank, s.used_tokens) for s in page.ranks] == expected

    def test_names_of_one_queue_count_once(self) -> None:
        """The bootstrap queue had another name before 0.5.11; a page with both has it once."""
        lines = ["num_used_tokens 1", "num_prefill_bootstrap_queue_reqs 4", "num_prefill_prealloc_queue_reqs 4"]
        page = read_metrics("".join(f"sglang:{line}\n" for line in lines).encode())

        assert page.ranks[0].waiting_requests == 4

    def test_rank_without_usage(self) -> None:
        """A rank of which only constants are told, as after the start, has no sample."""
        page = read_metrics(b'sglang:max_total_num_tokens{dp_rank="1"} 8\n')

        assert page == LoadPage(ranks=(), unpublished_ranks=(1,))

    def test_idle_server_that_has_told_nothing(self) -> None:
        """SGLang's page without any of the gauges is readable, and empty."""
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
    def test_other_bytes(self, page: bytes, kind: FailureKind) -> None:
        """What is no such page is refused, and says whether it is malformed or foreign."""
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
    def test_recorded_page(self, name: str, mode: Mode, attention: bool, port: int, follows: bool) -> None:
        """Every recorded server has two ranks, whichever of the two sizes tells them."""
        facts = read_server_info(recorded(name))

        assert (facts.version, facts.dp_ranks, facts.served_model) == (Version(0, 5, 23), 2, "tiny")
        assert (facts.mode, facts.dp_attention, facts.bootstrap_port) == (mode, attention, port)
        assert facts.follows_rooms is follows
        assert facts.metrics_enabled is True

    def test_old_page(self) -> None:
        """A page without the newer keys gives the ranks of dp_size and SGLang's default bootstrap port."""
        facts = read_server_info(
            b'{"version":"0.5.5","dp_size":4,"enable_dp_attention":true,"disaggregation_mode":"prefill",'
            b'"model_path":"/m","served_model_name":null,"internal_states":[{"x":1}]}'
        )

        assert (facts.dp_ranks, facts.dp_attention, facts.bootstrap_port, facts.served_model) == (4, True, 8998, "/m")

    @pytest.mark.parametrize("version", ["0.0.0.dev0", "main", "", None, 5, 0.5, ["0.5.23"], {"a": 1}])
    def test_version_that_names_no_release(self, version: object) -> None:
        """Whatever stands there: all else on the page counts, and rooms are followed as by the newest release."""
        page = {"dp_size": 4, "disaggregation_mode": "prefill", "version": version}
        facts = read_server_info(json.dumps(page).encode())

        assert (facts.version, facts.dp_ranks, facts.mode) == (None, 4, Mode.PREFILL)
        assert facts.follows_rooms

    def test_role_that_was_switched(self) -> None:
        """With --enable-pd-role-switch the role is the one of the schedulers, not of the launch arguments."""
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
    def test_version(self, text: str | None, version: Version | None) -> None:
        """Suffixes of a release do not matter; what is no release is None."""
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
    def test_follows_rooms(self, version: Version | None, mode: Mode, method: str | None, follows: bool) -> None:
        """Who dispatches by room depends on version, role and method."""
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
    def test_other_bytes(self, page: bytes, kind: FailureKind) -> None:
        """What is no such page is refused, and says whether it is malformed or foreign."""
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
class TestNothingElseEscapes:
    """Whatever the bytes are, a reader gives data or a ReaderError."""

    @given(page=st.binary(max_size=400))
    @settings(max_examples=200, deadline=None)
    def test_random_bytes(self, read: Callable[[bytes], object], name: str, page: bytes) -> None:
        """Random bytes are read or refused."""
        _reads_or_refuses(read, page)

    @given(data=st.data())
    @settings(max_examples=300, deadline=None)
    def test_mutated_page(self, read: Callable[[bytes], object], name: str, data: st.DataObject) -> None:
        """A real page with a stretch replaced, removed or repeated is read or refused."""
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
    def test_page_with_foreign_values(
        self, read: Callable[[bytes], object], name: str, key: int, value: object
    ) -> None:
        """A page in which one value is of any other type is read or refused."""
        if not name.endswith(".json"):
            _reads_or_refuses(read, f'sglang:num_used_tokens{{dp_rank="{value}"}} {value}\n'.encode(errors="replace"))
            return
        body = json.loads(recorded(name))
        target = body["loads"][0] if "loads" in body else body
        names = sorted(target, key=lambda each: (each not in {"dp_size", "version", "timestamp"}, each))
        target[names[key % len(names)]] = value
        _reads_or_refuses(read, json.dumps(body).encode(errors="replace"))
