"""Guards background tasks: an unexpected exception of one is logged and counted, and the task is started again.

Without the guard such an exception would end the whole process with all its requests, or the task alone without notice.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, Metric

_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 10.0
"""Bound of the pause before a task is started again, in seconds. The pause doubles while the task fails soon."""
_STEADY_SECONDS: Final = 30.0
"""Seconds after which the failure of a task has nothing to do with its start, so that the pause is short again."""
_LOG_SECONDS: Final = 60.0
"""Seconds between two tracebacks of one type of exception of one task."""

_log = logging.getLogger(__name__)


class Guard:
    """Keeps the background tasks of a process running. It is a Prometheus collector."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        """Number of failures by the name of the task."""
        self._logged: dict[tuple[str, type[Exception]], float] = {}

    async def keep(self, name: str, work: Callable[[], Awaitable[object]], which: str = "") -> None:
        """Run a task until it returns or is cancelled. After any exception it is started again.

        Args:
            name: Name of the task in the log and in the metric. Several tasks may share one.
            work: Starts the task.
            which: Distinguishes tasks of one name in the log, for example by a URL.
        """
        self.failures[name] += 0  # a metric that is there from the start can be watched
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            started = loop.time()
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - catching everything is the purpose of the guard
                heed_cancellation()
                if loop.time() - started > _STEADY_SECONDS:
                    pause = _FIRST_PAUSE
                self.report(name, error, which, then=f"begins anew in {pause:g} s")
            else:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def report(self, name: str, error: Exception, which: str = "", *, then: str) -> None:
        """Count a failure of a task. Log it, unless one of the same name and type was logged within a minute.

        Args:
            name: Name of the task.
            error: The exception that the task raised.
            which: As in :meth:`keep`.
            then: What happens next, for the log.
        """
        self.failures[name] += 1
        kind, now = (name, type(error)), asyncio.get_running_loop().time()
        if now - self._logged.get(kind, -_LOG_SECONDS) >= _LOG_SECONDS:
            self._logged[kind] = now
            _log.error(
                "background task %s: has failed unexpectedly (%d times so far), %s; please report it, "
                "with what follows",
                f"{name} {which}".rstrip(),
                self.failures[name],
                then,
                exc_info=error,
            )

    def collect(self) -> Iterator[Metric]:
        failures = CounterMetricFamily(
            "dp_extproc_task_failures",
            "Unexpected failures of background tasks, each of which goes on or has begun anew.",
            labels=["task"],
        )
        for name, count in self.failures.items():
            failures.add_metric([name], count)
        yield failures


def heed_cancellation() -> None:
    """Raise the cancellation of the present task again, if it was swallowed.

    redis-py (8.1) swallows a cancellation at the moment of an answer, and a task group one at the moment of a failure.
    Without this call the service would wait for the end of the task without limit.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
