"""The one guard for what runs in the background: a fault of it is logged and counted, and it begins anew.

Without the guard an exception that nobody expected in one of these tasks would end the whole process, and with it every
request; or the task alone, which nobody would see.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, Metric

_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 10.0
"""Seconds before a task begins anew; twice as many each time while it fails soon."""
_STEADY_SECONDS: Final = 30.0
"""A task that has run for so long did not fail because of how it began."""
_LOG_SECONDS: Final = 60.0
"""Between two tracebacks of one kind of error of one task."""

_log = logging.getLogger(__name__)


class Guard:
    """Keeps the background tasks of a process. A Prometheus collector."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """By the names of tasks."""
        self._logged: dict[tuple[str, type[Exception]], float] = {}

    async def keep(self, name: str, work: Callable[[], Awaitable[object]], of: str = "") -> None:
        """Run something until it returns or is cancelled; after any exception, again.

        Args:
            name: What it is, for the log and the metric; several tasks may share one.
            work: Begins it.
            of: Which one of those that share the name, for the log.
        """
        self.failures[name] += 0  # a metric that is there from the start can be watched
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            begun = loop.time()
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - that is what the guard is for
                heed_cancellation()
                if loop.time() - begun > _STEADY_SECONDS:
                    pause = _FIRST_PAUSE
                self.report(name, error, of, then=f"begins anew in {pause:g} s")
            else:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def report(self, name: str, error: Exception, of: str = "", *, then: str) -> None:
        """Count a failure of a task, and log it unless the same was logged within a minute.

        Args:
            name: Of the task.
            error: What was raised.
            of: Which task of those that share the name.
            then: What happens next, for the log.
        """
        self.failures[name] += 1
        kind, now = (name, type(error)), asyncio.get_running_loop().time()
        if now - self._logged.get(kind, -_LOG_SECONDS) >= _LOG_SECONDS:
            self._logged[kind] = now
            _log.error(
                "background task %s: has failed unexpectedly (%d times so far), %s; please report it, "
                "with what follows",
                f"{name} {of}".rstrip(),
                self.failures[name],
                then,
                exc_info=error,
            )

    def collect(self) -> Iterator[Metric]:
        """Collect for /metrics."""
        failures = CounterMetricFamily(
            "dp_extproc_task_failures",
            "Unexpected failures of background tasks, each of which has begun anew.",
            labels=["task"],
        )
        for name, count in self.failures.items():
            failures.add_metric([name], count)
        yield failures


def heed_cancellation() -> None:
    """Raise the cancellation of the present task, if it had one and somebody swallowed it.

    redis-py (8.1) does so with one that comes just as it gets its answer, and a task group with one that comes just as
    a task of it fails. The service would wait for ever for this task to end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
