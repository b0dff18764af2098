"""An engine is suspect if its published load stands still for longer than its pace explains, and only then."""

from dataclasses import replace

import pytest

from dp_extproc.engines.model import DecodeSteps, LoadPage, PrefillSteps, RankSample, Role
from dp_extproc.load.endpoint import EndpointLoad, Freshness
from fleet_fixtures import Fleet, make_facts

PER_TOKEN = 1e-4
"""Seconds per prompt token of these engines: a chunk of 8192 takes 0.8 s."""
TPOT = 0.05


class Engine:
    """An endpoint whose pages are read each second, and whose schedulers publish as long as they run."""

    def __init__(self, fleet: Fleet, role: Role, *, running: int = 0) -> None:
        self.fleet = fleet
        self.load: EndpointLoad = fleet.endpoint(role)
        self.published = [fleet.clock()] * len(self.load.ranks)
        self.running = running
        self._steps = 0.0

    def read(self, *, moving: bool = True, only: int | None = None) -> None:
        """Read a page a second later. Of ranks with a load *only* one publishes, if it is given."""
        clock = self.fleet.clock
        clock.now += 1
        if moving:
            self._steps += 20
            self.published = [clock() if only in {None, rank} else before for rank, before in enumerate(self.published)]
        ranks = tuple(
            RankSample(
                rank,
                used_tokens=0,
                running_requests=self.running,
                decoded=DecodeSteps(self._steps, self._steps, TPOT * self._steps, self._steps),
                prefilled=PrefillSteps(1000 * self._steps, PER_TOKEN * 1000 * self._steps),
                age=clock() - at,
            )
            for rank, at in enumerate(self.published)
        )
        self.fleet.load.sampled(self.load.configured, LoadPage(ranks), clock(), clock())

    def seconds_until_suspect(self, most: int = 300) -> int | None:
        """Read pages on which nothing moves until the endpoint is suspect; None if it never is."""
        for passed in range(1, most + 1):
            self.read(moving=False)
            if self.state is Freshness.SUSPECT:
                return passed
        return None

    @property
    def state(self) -> Freshness:
        return self.load.freshness(self.fleet.clock(), self.fleet.load.stale_after)


def make_engine(role: Role, *, reads: int = 3, running: int = 0, **facts: object) -> Engine:
    of_role = replace(make_facts(role), **facts)  # type: ignore[arg-type]
    by_role = {each: [of_role if each is role else make_facts(each)] for each in Role}
    if role is Role.WORKER:
        fleet = Fleet(workers=by_role[role])
    else:
        fleet = Fleet(prefills=by_role[Role.PREFILL], decodes=by_role[Role.DECODE])
    engine = Engine(fleet, role, running=running)
    for _ in range(reads):
        engine.read()
    return engine


@pytest.mark.parametrize("role", list(Role))
def test_endpoint_is_suspect_soon_if_its_published_load_stands_still(role: Role) -> None:
    """Its page answers each second, and a request waits; the next published load shows that it goes on."""
    engine = make_engine(role)
    engine.load.reserve(1, 1000, engine.fleet.clock())

    assert engine.seconds_until_suspect() == 6
    assert engine.fleet.load.best_known([engine.load], engine.fleet.clock()) == (Freshness.SUSPECT, [engine.load])
    engine.read()
    assert engine.state is Freshness.FRESH


@pytest.mark.parametrize("role", list(Role))
def test_idle_endpoint_is_never_suspect(role: Role) -> None:
    """Without a request nothing has to move."""
    assert make_engine(role).seconds_until_suspect() is None


@pytest.mark.parametrize("rank", [0, 3])
def test_one_long_prompt_without_chunks_makes_no_endpoint_suspect(rank: int) -> None:
    """A prompt of 128,000 tokens takes 13 s, and its attention as long again; all ranks wait for it in lockstep."""
    engine = make_engine(Role.PREFILL, chunked=False)
    now = engine.fleet.clock()
    engine.load.reserve(rank, 128_000, now)
    engine.load.reserve(1, 1000, now)

    suspect_after = engine.seconds_until_suspect()
    assert suspect_after is not None
    assert 2 * 26 < suspect_after < 280


@pytest.mark.parametrize("size", [{"cached": 127_000.0}, {"requests": 1.0}], ids=["in a lost cache", "of any rank"])
def test_long_prompt_makes_no_endpoint_suspect_whichever_part_was_expected(size: dict[str, float]) -> None:
    """The engine may have evicted what was expected in its cache, and may have picked any rank for all of a request."""
    engine = make_engine(Role.PREFILL, chunked=False)
    engine.load.reserve(0 if "cached" in size else None, 128_000, engine.fleet.clock(), **size)

    suspect_after = engine.seconds_until_suspect()
    assert suspect_after is not None
    assert suspect_after > 2 * 26


def test_chunks_of_a_cached_long_context_make_no_endpoint_suspect() -> None:
    """Each chunk attends to all of the 512,000 tokens, and so takes nine times as long as without them."""
    engine = make_engine(Role.PREFILL)
    engine.load.reserve(0, 512_000, engine.fleet.clock(), cached=500_000.0)

    suspect_after = engine.seconds_until_suspect()
    assert suspect_after is not None
    assert suspect_after > 2 * 7


def test_page_that_comes_late_makes_no_endpoint_suspect() -> None:
    """It shows no more than how the engine was when it was asked: this process, or the network, was busy since then."""
    engine = make_engine(Role.PREFILL)
    engine.load.reserve(0, 1000, engine.fleet.clock())
    engine.read(moving=False)
    page = LoadPage(tuple(rank.sample for rank in engine.load.ranks if rank.sample is not None))
    asked_at = engine.fleet.clock()
    engine.fleet.clock.now += 20
    engine.fleet.load.sampled(engine.load.configured, page, asked_at, engine.fleet.clock())

    assert not engine.load.is_suspect


def test_cancelled_prompt_may_still_be_computed() -> None:
    """The engine computes a prompt to its end whose client has left."""
    engine = make_engine(Role.PREFILL, chunked=False)
    now = engine.fleet.clock()
    (long,) = engine.load.reserve(0, 128_000, now)
    engine.load.reserve(1, 1000, now)
    long.cancel(now + 1)

    suspect_after = engine.seconds_until_suspect()
    assert suspect_after is not None
    assert suspect_after > 2 * 26


def test_lockstep_ranks_move_together() -> None:
    """A rank that publishes shows that the steps of its group go on."""
    engine = make_engine(Role.DECODE)
    engine.load.reserve(0, 1000, engine.fleet.clock())
    for _ in range(20):
        engine.read(only=2)

    assert engine.state is Freshness.FRESH


def test_hung_replica_of_plain_dp_is_left_out_alone() -> None:
    """Ranks without a common step hang one by one; the others stay in use."""
    engine = make_engine(Role.DECODE, running=1, dp_attention=False)
    for rank in range(4):
        engine.load.reserve(rank, 1000, engine.fleet.clock())
    for _ in range(10):
        for rank in (0, 1, 3):
            engine.read(only=rank)

    assert engine.state is Freshness.FRESH
    assert [rank.index for rank in engine.load.candidate.ranks] == [0, 1, 3]
    assert engine.seconds_until_suspect() is not None
    assert [rank.index for rank in engine.load.candidate.ranks] == [0, 1, 2, 3]


@pytest.mark.parametrize("role", list(Role))
def test_engine_that_has_computed_nothing_is_not_suspect(role: Role) -> None:
    """Its first steps may capture graphs and compile kernels, and its pace is unknown."""
    engine = make_engine(role, reads=0)
    engine.load.reserve(0, 1000, engine.fleet.clock())

    assert engine.seconds_until_suspect() is None


def test_pages_without_time_stamps_make_no_endpoint_suspect() -> None:
    """Gauges of /metrics stay the same beside busy peers."""
    engine = make_engine(Role.PREFILL)
    engine.load.reserve(0, 1000, engine.fleet.clock())
    for _ in range(30):
        engine.fleet.clock.now += 1
        engine.fleet.sample(engine.load.configured, [0] * 4, age=None)

    assert engine.state is Freshness.FRESH


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_older_release_that_waits_for_the_other_leg_is_not_suspect(role: Role) -> None:
    """Until 0.5.18 nothing is published while requests wait for the other engine."""
    engine = make_engine(role, version=make_facts(role, (0, 5, 18)).version)
    engine.load.reserve(0, 1000, engine.fleet.clock())
    for group in engine.load.groups:
        if role is Role.PREFILL:
            group.waits_for_decode = True  # type: ignore[attr-defined]

    assert engine.seconds_until_suspect() is None


def test_older_release_is_suspect_if_its_running_requests_stand_still() -> None:
    """Whatever waits for prefill, sequences that run get tokens."""
    engine = make_engine(Role.DECODE, running=2, version=make_facts(Role.DECODE, (0, 5, 18)).version)
    engine.load.reserve(0, 1000, engine.fleet.clock())

    assert engine.seconds_until_suspect() == 16


def test_pause_that_ended_makes_the_next_one_less_suspicious() -> None:
    """An engine with long pauses of its own is not suspect again at each of them."""
    engine = make_engine(Role.PREFILL)
    engine.load.reserve(0, 1000, engine.fleet.clock())
    for _ in range(9):
        engine.read(moving=False)
    engine.read()

    assert engine.seconds_until_suspect() == 31
