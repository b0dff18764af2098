"""Autoscaling signals: hand-computed numbers of each role, which endpoints count, and laws that hold for any load."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.config.autoscaling import AutoscalingSettings
from dp_extproc.config.reliability import OutlierDetectionSettings
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import LoadPage, RankSample, Role
from dp_extproc.load.autoscaling import Autoscaling, Measure, Signal
from dp_extproc.load.records import NO_WORK, Work
from dp_extproc.load.step_group import Reservation
from dp_extproc.request.path import Api
from fleet_fixtures import Fleet, make_endpoint, make_facts

SETTINGS = AutoscalingSettings(prefill_target=0.5, decode_target=0.8, worker_target=0.4)
CAPACITY = 10_000
"""KV tokens of each rank."""
RUNNING = 20
"""Sequences that each rank runs at a time."""


def page(*ranks: int, running: int = 0, waiting: int | None = None, computed: int | None = None) -> LoadPage:
    """Make a load page of ranks that use so many tokens."""
    return LoadPage(
        tuple(
            RankSample(
                rank,
                used_tokens=used,
                total_tokens=used,
                running_requests=running,
                waiting_uncached_tokens=waiting,
                capacity_tokens=CAPACITY,
                max_running_requests=RUNNING,
                age=0.0,
            )
            for rank, used in enumerate(ranks)
        ),
        uncached_prompt_tokens=computed,
    )


def waiting_on(page: LoadPage, *waiting: int) -> LoadPage:
    """Change how many prompt tokens wait on each rank."""
    ranks = zip(page.ranks, waiting, strict=True)
    return replace(page, ranks=tuple(replace(rank, waiting_uncached_tokens=tokens) for rank, tokens in ranks))


class Scaled:
    """A fleet with ranks of known capacity, and its signals."""

    def __init__(self, role: Role, engines: int, ranks: int = 2) -> None:
        self.role = role
        self.ranks = ranks
        facts = [replace(make_facts(role, ranks=ranks), step_tokens=1000)] * engines
        other = [make_facts(Role.PREFILL if role is Role.DECODE else Role.DECODE, ranks=ranks)]
        self.fleet = Fleet(
            prefills=facts if role is Role.PREFILL else other if role is Role.DECODE else (),
            decodes=facts if role is Role.DECODE else other if role is Role.PREFILL else (),
            workers=facts if role is Role.WORKER else (),
        )
        self.waiting = NO_WORK
        self.autoscaling = Autoscaling(self.fleet.load, SETTINGS, lambda _pool: self.waiting)
        for number in range(1, engines + 1):
            self.sample(number, [0] * ranks)

    def sample(self, number: int, used: Sequence[int], **more: int) -> None:
        now = self.fleet.clock()
        self.fleet.load.sampled(make_endpoint(self.role, number), page(*used, **more), now, now)

    def reserve(self, number: int, rank: int, tokens: float, requests: float = 1.0) -> Reservation:
        (reservation,) = self.fleet.endpoint(self.role, number).reserve(rank, tokens, self.fleet.clock(), requests)
        return reservation

    def arrive(self, tokens: float, seconds: int) -> None:
        """Let so many tokens arrive each second, up to now."""
        for second in range(seconds):
            self.fleet.load.arrivals["*"].add(tokens, self.fleet.clock() - second)

    def signal(self) -> Signal:
        (found,) = [each for each in self.autoscaling.signals(self.fleet.clock()) if each.role is self.role]
        return found


def test_decode_compares_the_tokens_of_kv_caches() -> None:
    """8,000 reserved and 4,000 external tokens of 40,000 are 0.3, for which 0.8 wants three quarters of an engine."""
    scaled = Scaled(Role.DECODE, engines=2)
    scaled.reserve(1, 0, 8000)
    scaled.sample(2, [4000, 0], running=1)

    signal = scaled.signal()

    assert signal.measures[Measure.KV_CACHE] == pytest.approx(0.3)
    assert signal.saturation == pytest.approx(0.3)
    assert signal.wanted == 1.0
    assert signal.endpoints * signal.use / signal.target == pytest.approx(2 * 0.3 / 0.8)


def test_decode_counts_the_output_tokens_of_running_sequences() -> None:
    """A sequence of 3,000 tokens has 4,000 after 30 s at 0.03 s per token. Its fixed cost in a step takes no space."""
    scaled = Scaled(Role.DECODE, engines=1, ranks=1)
    scaled.reserve(1, 0, 3000).first_token(scaled.fleet.clock())
    scaled.fleet.clock.now += 30

    assert scaled.signal().measures[Measure.KV_CACHE] == pytest.approx(0.4)


def test_decode_compares_the_sequences_if_their_share_is_larger() -> None:
    """30 of 80 sequences are 0.375, though they take few tokens."""
    scaled = Scaled(Role.DECODE, engines=2)
    scaled.reserve(1, 0, 100, requests=30)

    signal = scaled.signal()

    assert signal.measures == {Measure.KV_CACHE: pytest.approx(0.0025), Measure.REQUESTS: pytest.approx(0.375)}
    assert signal.saturation == pytest.approx(0.375)


def test_decode_wants_more_endpoints_than_there_are_if_it_is_overloaded() -> None:
    """60,000 tokens on 40,000 are 1.5: saturation stops at 1, and 2 * 1.5 / 0.8 engines are wanted."""
    scaled = Scaled(Role.DECODE, engines=2)
    for number, rank in ((1, 0), (1, 1), (2, 0), (2, 1)):
        scaled.reserve(number, rank, 15_000)

    signal = scaled.signal()

    assert signal.saturation == 1.0
    assert signal.wanted == pytest.approx(3.75)


def test_requests_in_the_admission_queue_count_as_placed() -> None:
    """20,000 tokens and 16 sequences that wait are a half and a fifth of two engines."""
    scaled = Scaled(Role.DECODE, engines=2)
    scaled.waiting = Work(20_000.0, 16.0)

    assert scaled.signal().measures == {Measure.KV_CACHE: pytest.approx(0.5), Measure.REQUESTS: pytest.approx(0.2)}


def test_prefill_compares_arrivals_with_the_measured_rate() -> None:
    """A full step of 1,000 tokens took 1 s, so two engines of two ranks compute 4,000 tokens/s, and 2,000 arrive."""
    scaled = Scaled(Role.PREFILL, engines=2)
    reservation = scaled.reserve(1, 0, 1000)
    scaled.fleet.clock.now += 1
    reservation.complete(scaled.fleet.clock())
    scaled.arrive(2000, seconds=600)

    signal = scaled.signal()

    assert signal.measures[Measure.PROMPT_RATE] == pytest.approx(0.5, rel=0.01)
    assert signal.measures[Measure.PROMPT_QUEUE] == 0.0
    assert signal.wanted == pytest.approx(2.0, rel=0.01)


def test_prefill_compares_the_time_of_waiting_tokens_with_the_wanted_time() -> None:
    """At 4,000 tokens/s, 9,000 reserved, 3,000 external and 4,000 queued tokens take 4 s, which is 0.4 of 10 s."""
    scaled = Scaled(Role.PREFILL, engines=2)
    done = scaled.reserve(1, 0, 1000)
    scaled.fleet.clock.now += 1
    done.complete(scaled.fleet.clock())
    scaled.reserve(1, 0, 10_000)  # of which the first chunk of 1,000 runs
    scaled.sample(2, [0, 0], running=1, waiting=1500)
    scaled.waiting = Work(4000.0, 1.0)

    assert scaled.signal().measures == {Measure.PROMPT_RATE: 0.0, Measure.PROMPT_QUEUE: pytest.approx(0.4)}


def test_prefill_of_unknown_rate_counts_as_the_others() -> None:
    """A third engine that has computed nothing yet adds as much capacity as the first one was measured to have."""
    rates = []
    for engines in (1, 2, 3):
        scaled = Scaled(Role.PREFILL, engines=engines)
        done = scaled.reserve(1, 0, 1000)
        scaled.fleet.clock.now += 1
        done.complete(scaled.fleet.clock())
        scaled.arrive(1000, seconds=600)
        rates.append(scaled.signal().measures[Measure.PROMPT_RATE])

    assert rates == pytest.approx([rates[0], rates[0] / 2, rates[0] / 3])


def test_aggregated_engines_report_space_alone_until_prompts_have_waited() -> None:
    """Their time per prompt token is unknown at first."""
    scaled = Scaled(Role.WORKER, engines=1)
    scaled.arrive(1e6, seconds=60)
    scaled.reserve(1, 0, 4000)

    assert set(scaled.signal().measures) == {Measure.KV_CACHE, Measure.REQUESTS}
    assert scaled.signal().saturation == pytest.approx(0.2)


def test_aggregated_engines_take_the_larger_use_of_space_and_time() -> None:
    """2,000 tokens/s were computed while 4,000 waited: 2 s of 10 s, and 1,000 arriving tokens/s, are 0.7 in all."""
    scaled = Scaled(Role.WORKER, engines=1)
    for _ in range(2):
        scaled.fleet.clock.now += 1
        scaled.sample(1, [100, 100], running=1, waiting=2000, computed=round(2000 * scaled.fleet.clock()))
    scaled.arrive(1000, seconds=600)

    signal = scaled.signal()

    assert signal.measures[Measure.PROMPT_QUEUE] == pytest.approx(0.2)
    assert signal.measures[Measure.PROMPT_RATE] == pytest.approx(0.5, rel=0.01)
    assert signal.measures[Measure.KV_CACHE] < 0.02
    assert signal.saturation == pytest.approx(0.7, rel=0.01)
    assert signal.wanted == pytest.approx(0.7 / 0.4, rel=0.01)


def test_aggregated_engine_shows_its_rate_only_while_prompts_wait_on_all_ranks() -> None:
    """If one rank is idle, the engine computes what arrives. Taken for its rate, each new engine would seem slower."""
    scaled = Scaled(Role.WORKER, engines=1)
    endpoint, load = make_endpoint(Role.WORKER), scaled.fleet.load
    for waiting, expected in (((2000, 0), None), ((2000, 1), 2000.0)):
        for _ in range(2):
            scaled.fleet.clock.now += 1
            now = scaled.fleet.clock()
            load.sampled(endpoint, waiting_on(page(100, 100, computed=round(2000 * now)), *waiting), now, now)
        assert scaled.fleet.endpoint(Role.WORKER).prompt_rate == expected


def test_request_that_waits_counts_for_one_role() -> None:
    """Of 12,000 tokens that wait, 3,000 wait for decode, and the others for prefill. These do not count for decode.

    The KV caches hold 20,000 tokens, of which 17,000 may be taken. The 12,000 and 8,000 others are 3,000 too many.
    """
    fleet = Fleet(
        prefills=[replace(make_facts(Role.PREFILL, ranks=2), step_tokens=1000)],
        decodes=[make_facts(Role.DECODE, ranks=2)],
    )
    now, prefill, decode = fleet.clock(), fleet.endpoint(Role.PREFILL), fleet.endpoint(Role.DECODE)
    fleet.load.sampled(make_endpoint(Role.DECODE), page(0, 0), now, now)
    prefill.reserve(0, 13_000, now)  # of which the first chunk of 1,000 runs
    decode.reserve(0, 12_000, now)
    decode.reserve(1, 8000, now)
    autoscaling = Autoscaling(fleet.load, AutoscalingSettings(), lambda _pool: NO_WORK)

    found = {signal.role: signal.measures for signal in autoscaling.signals(now)}

    assert found[Role.PREFILL][Measure.PROMPT_QUEUE] == pytest.approx(9000 / (2 * 6000) / 10)
    assert found[Role.DECODE][Measure.KV_CACHE] == pytest.approx((20_000 - 9000) / 20_000)
    assert found[Role.DECODE][Measure.REQUESTS] == pytest.approx(2 / 40)


@pytest.mark.parametrize(("taken", "expected"), [(16_000, 0.5), (18_000, 1.0)])
def test_prefill_rate_is_not_learned_while_decode_is_full(taken: float, expected: float) -> None:
    """A prompt that has waited for decode for 1 s more does not show how fast prefill is."""
    fleet = Fleet(
        prefills=[replace(make_facts(Role.PREFILL, ranks=1), step_tokens=1000)],
        decodes=[make_facts(Role.DECODE, ranks=2)],
    )
    prefill, decode = fleet.endpoint(Role.PREFILL), fleet.endpoint(Role.DECODE)

    def compute(seconds: float) -> None:
        (reservation,) = prefill.reserve(0, 1000, fleet.clock())
        fleet.clock.now += seconds
        reservation.complete(fleet.clock())

    compute(1)
    before = prefill.prompt_rate
    assert before is not None
    decode.reserve(0, taken, fleet.clock())
    fleet.load.sampled(make_endpoint(Role.DECODE), page(0, 0), fleet.clock(), fleet.clock())
    for _ in range(200):
        compute(2)
    assert prefill.prompt_rate == pytest.approx(before * expected, rel=0.02)


@pytest.mark.parametrize(("role", "expected"), [(Role.PREFILL, {Role.DECODE}), (Role.WORKER, {Role.WORKER})])
def test_prompts_are_not_compared_while_other_replicas_are_unknown(role: Role, expected: set[Role]) -> None:
    """A replica of three without the bus has a third of the arrivals, for which prefill would shrink to a third."""
    scaled = Scaled(role, engines=2)
    for second in (1, 2):
        scaled.fleet.clock.now += 1
        scaled.sample(1, [0, 0], waiting=1000, computed=1000 * second)
    for engine in scaled.fleet.load.endpoints:
        scaled.fleet.load.sampled(engine, page(0, 0), scaled.fleet.clock(), scaled.fleet.clock())
    assert Measure.PROMPT_RATE in scaled.signal().measures
    alone = Autoscaling(scaled.fleet.load, SETTINGS, lambda _pool: NO_WORK, has_all_arrivals=lambda: False)

    found = {signal.role: {*signal.measures} for signal in alone.signals(scaled.fleet.clock())}

    assert found == {each: {Measure.KV_CACHE, Measure.REQUESTS} for each in expected}


def test_roles_without_a_known_capacity_have_no_signal() -> None:
    """An invented number would scale a fleet; without one, an autoscaler leaves it as it is."""
    scaled = Scaled(Role.DECODE, engines=1)
    endpoint = make_endpoint(Role.DECODE)
    samples = tuple(replace(each, capacity_tokens=None, max_running_requests=0) for each in page(0, 0).ranks)
    scaled.fleet.load.sampled(endpoint, LoadPage(samples), scaled.fleet.clock(), scaled.fleet.clock())

    assert [each.role for each in scaled.autoscaling.signals(scaled.fleet.clock())] == [Role.PREFILL]

    scaled.fleet.load.update((), 5.0)
    assert list(scaled.autoscaling.signals(scaled.fleet.clock())) == []


def test_draining_endpoints_do_not_count() -> None:
    """Neither the capacity nor the requests of an endpoint that leaves are there for the next request."""
    scaled = Scaled(Role.DECODE, engines=2)
    scaled.reserve(1, 0, 5000)
    scaled.reserve(2, 0, 8000)
    scaled.fleet.load.update([each for each in scaled.fleet.endpoints if each != make_endpoint(Role.DECODE, 2)], 5.0)

    signal = scaled.signal()

    assert signal.endpoints == 1
    assert signal.saturation == pytest.approx(0.25)


def test_stale_endpoints_count_only_if_no_fresh_one_is_left() -> None:
    """As in scheduling: a dead engine is no capacity, and the last samples are better than none."""
    scaled = Scaled(Role.DECODE, engines=2)
    scaled.reserve(1, 0, 5000)
    scaled.fleet.clock.now += 4
    scaled.sample(1, [5000, 0], running=1)
    scaled.fleet.clock.now += 4

    assert scaled.signal().endpoints == 1
    assert scaled.signal().saturation == pytest.approx(0.25)

    scaled.fleet.clock.now += 4
    assert scaled.signal().endpoints == 2
    assert scaled.signal().saturation == pytest.approx(0.125)


def test_ejected_endpoints_count_only_if_no_other_is_left() -> None:
    """An ejected endpoint gets no request, so it is no capacity."""
    scaled = Scaled(Role.DECODE, engines=2)
    for number, expected in ((1, 1), (2, 2)):
        for _ in range(OutlierDetectionSettings().consecutive_failures):
            scaled.fleet.endpoint(Role.DECODE, number).health.failed(scaled.fleet.clock())
        assert scaled.signal().endpoints == expected


def test_endpoints_that_are_not_ready_do_not_count() -> None:
    """An engine that starts or shuts down gets no request."""
    scaled = Scaled(Role.DECODE, engines=2)
    scaled.fleet.endpoint(Role.DECODE, 2).is_ready = False
    assert scaled.signal().endpoints == 1


def test_undiscovered_and_unsampled_endpoints_do_not_count() -> None:
    """A new engine adds capacity with its first load page, when it gets its first request, too."""
    scaled = Scaled(Role.DECODE, engines=1)
    scaled.reserve(1, 0, 5000)
    load, added = scaled.fleet.load, make_endpoint(Role.DECODE, 2)
    load.update([*scaled.fleet.endpoints, added], 5.0)
    assert scaled.signal().endpoints == 1
    load.discovered(added, "10.0.0.2:1", make_facts(Role.DECODE, ranks=2), scaled.fleet.clock())
    assert scaled.signal().endpoints == 1

    scaled.sample(2, [0, 0])

    assert scaled.signal().endpoints == 2
    assert scaled.signal().saturation == pytest.approx(0.125)


def test_arrivals_are_those_of_requests_that_are_placed() -> None:
    """The tokens that a rank has to compute count once, for the pool, and stay when the pool gets another name."""
    scaled = Scaled(Role.DECODE, engines=1)
    prefill, decode = scaled.fleet.endpoint(Role.PREFILL), scaled.fleet.endpoint(Role.DECODE)
    before = scaled.fleet.load.arrivals["*"].per_second(scaled.fleet.clock())
    body = b'{"model": "*", "prompt": [%s]}' % b",".join([b"1"] * 600)
    scaled.fleet.scheduler.place(Api.COMPLETIONS, body)

    found = scaled.fleet.load.arrivals["*"].per_second(scaled.fleet.clock())
    assert before == 0.0
    assert found == pytest.approx(600 / 9.2109, rel=1e-4)
    assert prefill.reservations == decode.reservations == 1

    scaled.fleet.load.update([replace(each, pool="*,more") for each in scaled.fleet.endpoints], 5.0)
    assert scaled.fleet.load.arrivals["*,more"].per_second(scaled.fleet.clock()) == found


tokens = st.floats(0, 1e6)
loads = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 1), tokens, st.integers(0, 50)), max_size=8)


@pytest.mark.parametrize("role", Role)
@given(loads=loads, more=st.tuples(st.integers(1, 3), st.integers(0, 1), st.floats(1, 1e6)), rate=tokens, queued=tokens)
def test_signals_are_monotone(
    role: Role, loads: list[tuple[int, int, float, int]], more: tuple[int, int, float], rate: float, queued: float
) -> None:
    """An idle engine never raises the saturation, and work never lowers any signal. At least one engine is wanted."""

    def scaled(engines: int) -> Scaled:
        found = Scaled(role, engines)
        found.waiting = Work(queued, queued / 1000)
        found.arrive(rate, seconds=3)
        for number, rank, amount, requests in loads:
            found.reserve(number, rank, amount, requests)
        return found

    three, four = scaled(3), scaled(4)
    before = three.signal()
    assert 0 <= before.saturation <= 1 <= before.wanted
    assert four.signal().use <= before.use * (1 + 1e-9)
    three.reserve(*more)
    reserved = three.signal()
    three.waiting = Work(queued + more[2], queued / 1000 + 1)
    waiting = three.signal()
    three.fleet.load.arrivals["*"].add(more[2], three.fleet.clock())
    assert before.use <= reserved.use * (1 + 1e-9)
    assert reserved.use <= waiting.use * (1 + 1e-9)
    assert waiting.use <= three.signal().use * (1 + 1e-9)
    assert before.wanted <= reserved.wanted * (1 + 1e-9)


def test_failed_reads_leave_the_signal_until_the_endpoint_is_stale() -> None:
    """One failure is no change of the load."""
    scaled = Scaled(Role.DECODE, engines=1)
    scaled.reserve(1, 0, 5000)
    failure = EngineFailure(FailureKind.TIMEOUT, "no answer")
    scaled.fleet.load.failed(make_endpoint(Role.DECODE), failure, scaled.fleet.clock())

    assert scaled.signal().saturation == pytest.approx(0.25)
