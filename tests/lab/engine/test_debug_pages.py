"""Test what the stand-in reports about itself."""

import asyncio

import httpx
import pytest

from dp_extproc.lab.engine.pace import Pace
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess


def test_journal_returns_only_later_requests() -> None:
    """A measurement need not clear a journal that others read, nor fetch what it has read before."""
    with EngineProcess("unified", 1, "--time-scale", "0.01") as engine:
        for number in range(3):
            body = {"text": f"hello {number}", "sampling_params": {"max_new_tokens": 1}}
            loopback.CLIENT.post(f"{engine.url}/generate", json=body).raise_for_status()

        def ask(after: str) -> httpx.Response:
            return loopback.CLIENT.get(f"{engine.debug_url}/requests", params={"after": after})

        pages = [ask(after).json() for after in ("0", "2", "3", "9" * 18)]
        refusals = [ask(after).status_code for after in ("-1", "", "two", "9" * 5000)]
        engine.forget()
        forgotten = ask("0").json()

    assert [[request["number"] for request in page["requests"]] for page in pages] == [[1, 2, 3], [3], [], []]
    assert {page["count"] for page in (*pages, forgotten)} == {3}
    assert forgotten["requests"] == []
    assert refusals == [400] * 4


def test_steps_report_how_late_they_are() -> None:
    """Nothing is late in an engine that has time."""
    with EngineProcess("unified", 2, "--dp-attention") as engine:
        assert [group["late"] for group in engine.steps()] == [0.0]


def test_time_is_lost_beyond_the_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delay beyond the lag is not made up for, and counted; a smaller one is made up for."""
    clock = {"now": 100.0}
    monkeypatch.setattr("dp_extproc.lab.engine.pace.time.monotonic", lambda: clock["now"])

    async def steps() -> Pace:
        one = Pace()
        await one.step(0.0)
        clock["now"] += 0.03
        await one.step(0.0)
        assert one.lost == 0
        clock["now"] += 0.27
        await one.step(0.0)
        one.rest()
        clock["now"] += 0.01
        await one.step(0.0)
        return one

    assert asyncio.run(steps()).lost == pytest.approx(0.25)
