"""Whatever engines print on their pages, in whatever order: requests are placed, and every number stays finite."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from dp_extproc.config.autoscaling import AutoscalingSettings
from dp_extproc.engines.agreement import without_unknown_ranks
from dp_extproc.engines.listener import EngineFailure, EngineListeners
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Mode, Role
from dp_extproc.engines.pages import ReaderError
from dp_extproc.engines.sglang.load_pages import read_loads, read_metrics
from dp_extproc.engines.sglang.server_info import read_server_info
from dp_extproc.engines.vllm.pages import facts_of, read_vllm_metrics
from dp_extproc.load.autoscaling import Autoscaling
from dp_extproc.load.records import NO_WORK
from dp_extproc.observability.loads_page import describe_loads
from dp_extproc.observability.metrics import AutoscalingMetrics, Telemetry
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Decision, Queued
from finite import assert_finite
from fleet_fixtures import Fleet, address_of, make_endpoint, make_facts
from fuzz.effort import examples

PROMPT = json.dumps({"text": "a prompt of some length", "sampling_params": {"max_new_tokens": 1}}).encode()
EXPECTED = {Reason.PROMPT_TOO_LONG, Reason.OVER_CAPACITY}
"""A load page of ranks with almost no load."""
NOON = datetime(2026, 9, 10, 12, tzinfo=UTC)
EXTREMES = (
    0, 1, -1, 7, 0.5, 5e-324, -5e-324, 2.2e-308, 1e-160, 1e6, 1e15, 1.7e308, -1.7e308, 2**31, 2**53 - 1, 2**53, 2**63,
    2**64, 10**400, -(10**400), True, None, "7",
)  # fmt: skip
NUMBERS = st.sampled_from(EXTREMES) | st.integers() | st.floats() | st.integers(0, 5000)
MOMENTS = st.lists(NUMBERS, min_size=6, max_size=6) | st.none()
COUNTS = (
    "num_total_tokens", "num_waiting_uncached_tokens", "num_running_reqs", "num_waiting_reqs", "max_total_num_tokens",
    "max_running_requests", "gen_throughput", "total_prefill_uncached_tokens", "timestamp",
)  # fmt: skip
GAUGES = (
    "num_used_tokens", "max_total_num_tokens", "num_running_reqs", "num_queue_reqs", "num_prefill_bootstrap_queue_reqs",
    "gen_throughput", "prompt_tokens_total",
)  # fmt: skip
VLLM_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total")
VLLM_LABELS = ("kv_cache_size_tokens", "num_gpu_blocks", "block_size")
SAID = st.sampled_from(["0", "1", "7", "1e3", "5e-324", "1.7e308", "-1", "NaN", "+Inf", "9" * 400, "9007199254740992"])

loads_pages = st.fixed_dictionaries(
    {
        "loads": st.lists(
            st.fixed_dictionaries(
                {"dp_rank": st.integers(0, 3) | NUMBERS, "num_used_tokens": NUMBERS},
                optional={**dict.fromkeys(COUNTS, NUMBERS), "decode_moments": MOMENTS},
            ),
            max_size=4,
        )
    },
    optional={"timestamp": st.sampled_from(["2026-01-01T00:00:00+00:00", "0001-01-01T00:00:00", "9999-12-31", "x"])},
).map(lambda page: json.dumps(page).encode())
metrics_pages = st.lists(st.tuples(st.sampled_from(GAUGES), st.integers(0, 3), SAID), min_size=1, max_size=12).map(
    lambda lines: "".join(f'sglang:{name}{{dp_rank="{rank}"}} {said}\n' for name, rank, said in lines).encode()
)
vllm_pages = st.lists(
    st.tuples(st.sampled_from(VLLM_GAUGES), st.integers(0, 3), SAID)
    | st.tuples(st.sampled_from(VLLM_LABELS), st.integers(0, 3), SAID),
    min_size=1,
    max_size=12,
).map(lambda lines: "".join(_vllm_line(*line) for line in lines).encode())
info_pages = st.fixed_dictionaries(
    {"dp_size": st.just(4) | NUMBERS, "version": st.just("0.5.23"), "enable_dp_attention": st.booleans()},
    optional=dict.fromkeys(
        ("attn_dp_size", "chunked_prefill_size", "max_prefill_tokens", "disaggregation_bootstrap_port"), NUMBERS
    ),
)


def _vllm_line(name: str, engine: int, said: str) -> str:
    if name in VLLM_LABELS:
        return f'vllm:cache_config_info{{engine="{engine}",{name}="{said}",block_size="16"}} 1\n'
    return f'vllm:{name}{{engine="{engine}"}} {said}\n'


def raise_again(endpoint: Endpoint, error: Exception) -> None:
    """Fail the test by what a listener raised."""
    raise error


class Hostile:
    """A fleet whose engines print anything."""

    def __init__(self, *, workers: bool = False) -> None:
        self.is_aggregated = workers
        if workers:
            self.fleet = Fleet(workers=[make_facts(Role.WORKER)] * 2)
        else:
            self.fleet = Fleet(prefills=[make_facts(Role.PREFILL)] * 2, decodes=[make_facts(Role.DECODE)] * 2)
        self.telemetry = Telemetry(self.fleet.load, self.fleet.clock)
        autoscaling = Autoscaling(self.fleet.load, AutoscalingSettings(), lambda _pool: NO_WORK)
        self.telemetry.add(AutoscalingMetrics(autoscaling, self.fleet.clock))
        self.listeners = EngineListeners((self.fleet.load, self.telemetry), raise_again)
        self.attempts: list[Any] = []

    def show(self, role: Role, number: int, read: Callable[[bytes], LoadPage], page: bytes) -> None:
        """Let an engine print a load page."""
        endpoint, now = make_endpoint(role, number), self.fleet.clock()
        host = self.fleet.load.by_url[endpoint.url]
        try:
            self.listeners.sampled(endpoint, without_unknown_ranks(read(page), host.facts), now, now)
        except ReaderError as error:
            self.listeners.failed(endpoint, EngineFailure(error.kind, str(error)), now)

    def introduce(self, role: Role, number: int, facts: Callable[[], EngineFacts]) -> None:
        """Discover an engine with these facts."""
        endpoint: Endpoint = make_endpoint(role, number)
        try:
            self.listeners.discovered(endpoint, address_of(endpoint), facts(), self.fleet.clock())
        except ReaderError as error:
            self.listeners.failed(endpoint, EngineFailure(error.kind, str(error)), self.fleet.clock())

    def serve(self) -> None:
        """Place a request, let an older one go on, and look at both pages."""
        decision = self.fleet.scheduler.place(Api.GENERATE, PROMPT)
        if isinstance(decision, Decision):
            assert decision.in_flight is not None
            self.attempts.append(decision.in_flight)
        else:
            assert isinstance(decision, Rejection)
            assert decision.reason in EXPECTED
        if len(self.attempts) > 2:
            attempt = self.attempts.pop(0)
            attempt.prefill_answered(200, self.fleet.clock())
            attempt.first_byte(200, self.fleet.clock())
            self.fleet.clock.now += 0.5
            attempt.end(self.fleet.clock())
        loads = describe_loads(self.fleet.load, self.fleet.clock())
        assert_finite(self.telemetry.page().decode(), loads)


def moments(*numbers: float) -> bytes:
    """Make a load page on which every rank has decoded so much, just now."""
    told = {"num_used_tokens": 9, "num_running_reqs": 1, "decode_moments": numbers, "timestamp": NOON.timestamp()}
    ranks = [{"dp_rank": rank, **told} for rank in range(4)]
    return json.dumps({"timestamp": NOON.isoformat(), "loads": ranks}).encode()


STEPS = st.lists(
    st.tuples(
        st.sampled_from([(role, number) for role in (Role.PREFILL, Role.DECODE) for number in (1, 2)]),
        st.tuples(st.just(read_loads), loads_pages) | st.tuples(st.just(read_metrics), metrics_pages),
        st.sampled_from([0.0, 1.0, 30.0, 7200.0]),
    ),
    min_size=1,
    max_size=8,
)


@given(steps=STEPS)
@example(
    steps=[
        ((Role.DECODE, 1), (read_loads, moments(0, 0, 0, 0, 0, 0)), 1.0),
        ((Role.DECODE, 1), (read_loads, moments(5e-324, 1, 1e6, 0, 0, 1)), 1.0),
    ]
)
@example(
    steps=[
        ((Role.DECODE, 1), (read_loads, moments(1, 1, 1, 0, 0, 1)), 1.0),
        ((Role.DECODE, 1), (read_loads, moments(1.7e308, 1.7e308, 1.7e308, 0, 0, 2)), 1.0),
    ]
)
@examples(100)
def test_requests_are_scheduled_with_any_load_page(
    steps: list[tuple[tuple[Role, int], tuple[Callable[[bytes], LoadPage], bytes], float]],
) -> None:
    """No page is an error of ours, and none leaves a number behind that is none."""
    hostile = Hostile()
    for (role, number), (read, page), passed in steps:
        hostile.fleet.clock.now += passed
        hostile.show(role, number, read, page)
        hostile.serve()


@given(infos=st.lists(st.tuples(st.sampled_from([Role.PREFILL, Role.DECODE]), info_pages), min_size=1, max_size=4))
@example(infos=[(Role.PREFILL, {"dp_size": 4, "version": "0.5.23", "chunked_prefill_size": 10**400})])
@example(infos=[(Role.PREFILL, {"dp_size": 4, "version": "0.5.23", "chunked_prefill_size": 1 << 62})])
@examples(66)
def test_requests_are_scheduled_with_any_server_info(infos: list[tuple[Role, dict[str, Any]]]) -> None:
    """Numbers of ranks, tokens per step and ports are checked before they are used."""
    hostile = Hostile()
    for role, info in infos:
        mode = Mode.PREFILL if role is Role.PREFILL else Mode.DECODE
        page = json.dumps(info | {"disaggregation_mode": mode.value}).encode()
        hostile.introduce(role, 1, lambda page=page: read_server_info(page))  # type: ignore[misc]
        hostile.serve()
        hostile.show(role, 1, read_loads, json.dumps({"loads": [{"dp_rank": 0, "num_used_tokens": 70}]}).encode())
        hostile.serve()


@given(pages=st.lists(st.tuples(st.integers(1, 2), vllm_pages), min_size=1, max_size=6))
@examples(66)
def test_requests_are_scheduled_with_any_vllm_page(pages: list[tuple[int, bytes]]) -> None:
    """Its shares, counts and labels are checked in the same place."""
    hostile = Hostile(workers=True)
    for number, page in pages:
        hostile.fleet.clock.now += 1.0
        hostile.introduce(Role.WORKER, number, lambda page=page: facts_of("0.11.0", (), page))  # type: ignore[misc]
        decision = hostile.fleet.scheduler.place(Api.COMPLETIONS, b'{"model": "m", "prompt": "hello"}')
        assert not isinstance(decision, Queued)
        assert isinstance(decision, Decision) or decision.reason in EXPECTED
        hostile.show(Role.WORKER, number, read_vllm_metrics, page)
        assert_finite(hostile.telemetry.page().decode(), describe_loads(hostile.fleet.load, hostile.fleet.clock()))


def test_requests_are_scheduled_after_hours_without_decoding() -> None:
    """The weight of the learned pace halves again and again, and must not become a number whose products are zero."""
    hostile = Hostile()
    second = (33.0, 33.0, 1e6, 0.0, 0.0, 33.0)
    for counted in (1, 2):
        for number in (1, 2):
            hostile.show(Role.DECODE, number, read_loads, moments(*(counted * each for each in second)))
        hostile.fleet.clock.now += 1.0
    same = read_loads(moments(*(2 * each for each in second)))
    for _ in range(3 * 3600):
        hostile.fleet.clock.now += 1.0
        for number in (1, 2):
            hostile.listeners.sampled(
                make_endpoint(Role.DECODE, number), same, hostile.fleet.clock(), hostile.fleet.clock()
            )

    hostile.serve()
