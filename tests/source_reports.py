"""Runs one source of endpoints, and keeps what it reports."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dp_extproc.fleet.discovery.source import Member, Source


@dataclass
class Reports:
    """A listener that keeps every report; the last one is what counts."""

    snapshots: list[tuple[Member, ...]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    is_failing: bool = False

    def snapshot(self, members: tuple[Member, ...]) -> None:
        self.snapshots.append(members)
        self.is_failing = False

    def failed(self, message: str) -> None:
        self.failures.append(message)
        self.is_failing = True

    @property
    def urls(self) -> set[str] | None:
        """URLs of the last snapshot; None before the first."""
        return {each.url for each in self.snapshots[-1]} if self.snapshots else None


@contextmanager
def reports_of(source: Source) -> Iterator[Reports]:
    """Run a source in a thread with a loop of its own. At the end it is cancelled, and must not have ended before."""
    reports = Reports()
    loop = asyncio.new_event_loop()
    task = loop.create_task(source.run(reports))

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=run, name="source")
    thread.start()
    try:
        yield reports
        assert thread.is_alive(), "the source has ended"
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
