"""The guard over background tasks: each failure is counted and logged, and the task is started again."""

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

import pytest

from dp_extproc import background
from dp_extproc.background import Guard
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.lab.testbed.tied_process import start_tied
from patience import wait_for


def run(story: Coroutine[Any, Any, None]) -> None:
    """Run a test's story in a loop of its own, for 30 s at most."""
    asyncio.run(asyncio.wait_for(story, 30))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start tasks again at once."""
    monkeypatch.setattr(background, "_FIRST_PAUSE", 0.0)


class Work:
    """A task that fails some times, and then waits."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.lasts = asyncio.Event()
        self.ends = asyncio.Event()

    async def run(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.lasts.set()
        await self.ends.wait()


def test_task_is_started_again_after_any_exception(caplog: pytest.LogCaptureFixture) -> None:
    """Each type of exception has one traceback in the log; the metric counts all."""

    async def story() -> None:
        guard = Guard()
        group = ExceptionGroup("unhandled errors in a TaskGroup", [ZeroDivisionError("division by zero")])
        work = Work(ZeroDivisionError("float division by zero"), RecursionError("too deep"), group)
        task = asyncio.create_task(guard.keep("scrape", work.run, "http://10.0.0.1:30000"))
        await work.lasts.wait()

        assert guard.failures == {"scrape": 3}
        assert not task.done()
        work.ends.set()
        await task

    run(story())
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    assert all("background task scrape http://10.0.0.1:30000" in record.getMessage() for record in caplog.records)
    assert all(record.exc_info for record in caplog.records)


def test_task_that_always_fails_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Many failures a second must not fill the disk."""

    async def story() -> None:
        guard = Guard()
        work = Work(*[ValueError("the same as ever")] * 500)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(guard.keep("readiness", work.run))
            await work.lasts.wait()
            task.cancel()
        assert guard.failures["readiness"] == 500

    run(story())
    assert len(caplog.records) == 1


def test_task_ends_when_it_is_cancelled() -> None:
    """A cancellation is no failure."""

    async def story() -> None:
        guard, work = Guard(), Work()
        task = asyncio.create_task(guard.keep("sync", work.run))
        await work.lasts.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert guard.failures == {"sync": 0}

    run(story())


SABOTAGE = """
import sys
from dp_extproc.cli import main
from dp_extproc.runtime.readiness import Readiness
from dp_extproc.runtime.reload import Reloader

sound, failed = Readiness.run, []

async def unsound(readiness):
    if len(failed) < 2:
        failed.append(1)
        raise ZeroDivisionError("float division by zero")
    await sound(readiness)

async def never_sound(reloader):
    raise RecursionError("maximum recursion depth exceeded")

Readiness.run = unsound
Reloader.run = never_sound
sys.exit(main())
"""


class SabotagedService(ServiceProcess):
    """A service whose readiness task fails twice and whose reload task always fails. Worker processes are spared."""

    def start(self) -> None:
        argv = [sys.executable, "-c", SABOTAGE, *self._arguments]
        with self._log_path.open("ab") as log:
            self._process = start_tied(argv, log, log)

    def failures(self, task: str, worker: str = "") -> float:
        """Read the metric of a task; 0 while it is absent."""
        labels = f'process="{worker}",' if worker else ""
        wanted = f'dp_extproc_task_failures_total{{{labels}task="{task}"}} '
        lines = [line for line in self.metrics().splitlines() if line.startswith(wanted)]
        return float(lines[0].removeprefix(wanted)) if lines else 0.0


def sabotaged(**sections: Any) -> SabotagedService:
    """Make a service whose engine does not exist."""
    pool = {"models": ["*"], "workers": {"endpoints": [f"http://127.0.0.1:{free_port()}"]}}
    return SabotagedService(write_config([pool], **sections))


def test_service_outlives_failures_of_its_tasks() -> None:
    """A task that failed twice works then; one that always fails is started again and again."""
    with sabotaged() as service:
        wait_for(lambda: service.failures("readiness") == 2 and service.failures("reload") >= 3, 30)

        assert loopback.CLIENT.get(f"{service.admin_url}/readyz").status_code == 503  # of no engine, not of a fault
        assert service.failures("scrape") == 0
        assert [service.log().count(f"background task {name}:") for name in ("readiness", "reload")] == [1, 1]
        assert service.log().count("ZeroDivisionError: float division by zero") == 1
        assert service.is_running


def test_parent_of_worker_processes_outlives_failures_of_its_tasks() -> None:
    """Its tasks are shown beside those of the worker processes."""
    with sabotaged(listen={"workers": 2}) as service:
        wait_for(lambda: service.failures("reload", "parent") >= 3, 30)
        wait_for(lambda: 'dp_extproc_task_failures_total{process="1",task="scrape"} 0.0' in service.metrics(), 30)

        assert service.metrics().count("# TYPE dp_extproc_task_failures_total counter") == 1
        assert service.is_running
