"""Test comparisons over seeds, and the highest rate of a fleet."""

import pytest

from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.engine.scheduler.rank import Limits
from dp_extproc.lab.workload.capacity import Topology, requests_per_second
from dp_extproc.lab.workload.comparison import change
from dp_extproc.lab.workload.trace import Segment, TraceRequest

COSTS = Costs(prefill_step=0.1, prefill_token=0.001, decode_step=0.01, decode_request=0.001, decode_token=0.0)
CHUNKS = Limits(capacity=100_000, max_running=100, chunk=900)


def test_change_compares_pair_by_pair() -> None:
    """A fifth less at every seed is certainly a fifth less, however much the seeds differ."""
    found = change([80, 800, 8], [100, 1000, 10])
    assert found.mean == pytest.approx(-0.2)
    assert found.margin == pytest.approx(0, abs=1e-9)
    assert found.is_certain


def test_margin_is_by_students_t() -> None:
    """Changes of -10 %, -20 % and -30 %: 4.30 times their deviation over the root of three."""
    found = change([90, 80, 70], [100, 100, 100])
    assert found.mean == pytest.approx(-0.2)
    assert found.margin == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert not found.is_certain


def test_margin_is_normal_with_many_seeds() -> None:
    """There are twenty of them."""
    found = change([90, 110] * 10, [100] * 20)
    assert found.margin == pytest.approx(1.96 * 0.1026 / 20**0.5, rel=1e-3)


def test_one_seed_has_no_margin() -> None:
    """There is a change, but it is not certain."""
    found = change([50], [100])
    assert (found.mean, found.margin, found.is_certain) == (-0.5, None, False)


@pytest.mark.parametrize(("values", "baseline"), [([], []), ([1.0], [1.0, 2.0])], ids=["none", "of unequal number"])
def test_change_refuses_unpaired_numbers(values: list[float], baseline: list[float]) -> None:
    """Every run needs its baseline."""
    with pytest.raises(ValueError, match=r"no runs|shorter|longer"):
        change(values, baseline)


def test_topology_is_parsed_and_printed() -> None:
    """Two prefill engines, one decode engine, eight ranks."""
    assert Topology.parse("2p1d8") == Topology(2, 1, 8)
    assert str(Topology(2, 1, 8)) == "2p1d8"


@pytest.mark.parametrize("text", ["", "0p1d2", "2p1d", "1p1d2x", "p1d2"])
def test_topology_refuses_other_texts(text: str) -> None:
    """The message has an example."""
    with pytest.raises(ValueError, match="such as 2p1d8"):
        Topology.parse(text)


def test_prefill_is_the_limit_for_long_prompts() -> None:
    """Two ranks with 900 tokens a step of one second: 1800 tokens per second and engine, three prompts of 600."""
    trace = [TraceRequest(0, (Segment(1, 600),), 1)]
    assert requests_per_second(Topology(1, 1, 2), COSTS, CHUNKS, CHUNKS, trace) == pytest.approx(3)
    assert requests_per_second(Topology(2, 1, 2), COSTS, CHUNKS, CHUNKS, trace) == pytest.approx(6)


def test_decode_is_the_limit_for_long_answers() -> None:
    """Two ranks of 100 sequences, a step of 0.11 seconds: 1818 tokens per second, 18 answers of 100."""
    trace = [TraceRequest(0, (Segment(1, 10),), 100)]
    assert requests_per_second(Topology(1, 1, 2), COSTS, CHUNKS, CHUNKS, trace) == pytest.approx(200 / 0.11 / 100)


def test_kv_room_bounds_the_batch() -> None:
    """Room for 10 sequences of 60 tokens on average and 40 kept free: a tenth of the batch, a step of 0.02 seconds."""
    trace = [TraceRequest(0, (Segment(1, 10),), 100)]
    tight = Limits(capacity=1000, max_running=100, chunk=900, reserved=40)
    assert requests_per_second(Topology(1, 1, 2), COSTS, CHUNKS, tight, trace) == pytest.approx(20 / 0.02 / 100)
