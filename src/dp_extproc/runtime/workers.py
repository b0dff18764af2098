"""The parent of several workers: starts each, starts anew whichever ends, and shows the pages of all on one port."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import ValidationError

from dp_extproc import __version__
from dp_extproc.background import Guard
from dp_extproc.config import Config
from dp_extproc.observability.admin import AdminServer
from dp_extproc.observability.merged_metrics import merge_pages
from dp_extproc.runtime.reload import Reloader
from dp_extproc.runtime.sockets import StartError, listen
from dp_extproc.runtime.worker_context import WorkerContext, bus_of

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 10.0
_STEADY_SECONDS: Final = 30.0
"""A worker that has run for so long did not end because of how it was started."""
_MOST_DOUBLINGS: Final = 16
_PAGE_SECONDS: Final = 2.0
_NEWS: Final = b"\n"
_PARENT: Final = "parent"
"""Who this is in the label ``process``."""

_log = logging.getLogger(__name__)


def pause_before(ends: int) -> float:
    """Tell how long to wait before a worker is started anew that has ended so many times in a row."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(ends - 1, _MOST_DOUBLINGS))


class _Worker:
    """One worker, over all the processes that it is in the course of time."""

    def __init__(self, index: int, directory: Path, log_level: str) -> None:
        self.index = index
        self.restarts = 0
        self._directory = directory
        self._log_level = log_level
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: int | None = None
        admin_socket = WorkerContext(index, 0, directory).admin_socket
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(admin_socket)), base_url="http://worker", timeout=_PAGE_SECONDS
        )

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return None if self._process is None else self._process.pid

    async def run(self, stopping: asyncio.Event) -> None:
        """Keep it running; when all are stopping, until it has ended."""
        ends = 0
        while not stopping.is_set():
            started = time.monotonic()
            try:
                end = f"has ended with status {await self._run_once(stopping)}"
            except OSError as error:  # the machine has no more memory, processes or files to give
                end = f"cannot be started ({error})"
            if stopping.is_set():
                break
            ends = 1 if time.monotonic() - started > _STEADY_SECONDS else ends + 1
            pause = pause_before(ends)
            _log.error("worker %d %s; starting it again in %.3g s", self.index, end, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), pause)
            self.restarts += 1
        await self._client.aclose()

    async def _run_once(self, stopping: asyncio.Event) -> int:
        own_end, self._lifeline = os.pipe()
        seat = WorkerContext(self.index, own_end, self._directory)
        argv = ["-m", "dp_extproc", "serve", "--config", str(configuration_of(self._directory))]
        argv += ["--log-level", self._log_level, "--worker-seat", seat.argument]
        try:
            try:
                # Of a group of its own: a Ctrl-C in the terminal is for the parent, which passes it on.
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, *argv, stdin=asyncio.subprocess.DEVNULL, pass_fds=[own_end], process_group=0
                )
            finally:
                os.close(own_end)
            if stopping.is_set():  # while it was being started
                self.signal(signal.SIGTERM)
            return await self._process.wait()
        finally:
            self._process = None
            os.close(self._lifeline)
            self._lifeline = None

    def signal(self, number: signal.Signals) -> None:
        """Pass a signal on, if it runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def tell(self) -> None:
        """Have it read the configuration anew; one that starts just now will find this in the pipe."""
        if self._lifeline is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._lifeline, _NEWS)

    async def page(self, path: str) -> httpx.Response | None:
        """Get a page of it; None if it does not answer."""
        try:
            return await self._client.get(path)
        except httpx.HTTPError:
            return None


class _Pages:
    """What the admin port shows of all workers."""

    def __init__(self, workers: list[_Worker], registry: CollectorRegistry, guard: Guard) -> None:
        self._workers = workers
        self._registry = registry
        self._guarded = CollectorRegistry()
        """What workers count, too."""
        self._guarded.register(guard)

    async def metrics(self) -> bytes:
        pages = await self._all("/metrics")
        texts = {_PARENT: generate_latest(self._guarded).decode()}
        texts |= {str(worker.index): page.text for worker, page in pages if page is not None}
        return generate_latest(self._registry) + merge_pages(texts).encode()

    async def ready(self) -> bool:
        return any(page is not None and page.is_success for _, page in await self._all("/readyz"))

    async def loads(self) -> dict[str, Any]:
        """Show the books as the first worker that answers has them, and who the workers are."""
        ready = {worker.index for worker, page in await self._all("/readyz") if page is not None and page.is_success}
        who = [
            {"process": each.index, "pid": each.pid, "ready": each.index in ready, "restarts": each.restarts}
            for each in self._workers
        ]
        books = [page.json() for _, page in await self._all("/loads") if page is not None]
        return {**(books[0] if books else {}), "worker_processes": who}

    async def _all(self, path: str) -> list[tuple[_Worker, httpx.Response | None]]:
        return list(zip(self._workers, await asyncio.gather(*(each.page(path) for each in self._workers)), strict=True))


class _Metrics:
    """Collects what only the parent knows."""

    def __init__(self, workers: list[_Worker]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        running = sum(worker.pid is not None for worker in self._workers)
        yield GaugeMetricFamily("dp_extproc_worker_processes", "Worker processes that run.", value=running)
        restarts = CounterMetricFamily(
            "dp_extproc_worker_process_restarts", "Times a worker process ended by itself.", labels=["process"]
        )
        for worker in self._workers:
            restarts.add_metric([str(worker.index)], worker.restarts)
        yield restarts


def configuration_of(directory: Path) -> Path:
    """Name the copy of the configuration in use: a worker that starts anew must not meet a file that was refused."""
    return directory / "config.yaml"


async def serve_with_workers(count: int, config: Config, text: str, path: Path, log_level: str) -> None:
    """Serve with several processes until a signal, and until all of them have ended.

    Args:
        count: How many there are to be.
        config: The configuration as it is in the file.
        text: The content of the file ...
        path: ... and where it is.
        log_level: Of the workers.

    Raises:
        StartError: The admin port is not to be had, or the directory for temporary files is of no use.
    """
    with tempfile.TemporaryDirectory(prefix="dp-extproc-") as name:
        directory = Path(name)  # for its user alone
        try:
            bus_of(directory)
        except ValidationError as error:
            raise StartError(f"{directory}: {error.errors()[0]['msg']}; set TMPDIR to a shorter one") from None
        _write(directory, text)
        workers = [_Worker(index, directory, log_level) for index in range(count)]

        def apply(_config: Config, text: str) -> None:
            _write(directory, text)
            for worker in workers:
                worker.tell()

        reloader = Reloader(path, text, config, apply)
        guard = Guard()
        registry = CollectorRegistry()
        registry.register(reloader)
        registry.register(_Metrics(workers))
        admin = AdminServer(_Pages(workers, registry, guard), listen(config.listen.admin, "listen.admin"))
        stopping = asyncio.Event()

        def stop(number: signal.Signals) -> None:
            stopping.set()
            for worker in workers:
                worker.signal(number)

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        loop.add_signal_handler(signal.SIGHUP, reloader.ask)
        async with asyncio.TaskGroup() as tasks:
            admin_task = tasks.create_task(guard.keep("admin", admin.run_on_socket))
            reload_task = tasks.create_task(guard.keep("reload", reloader.run))
            _log.info("dp-extproc %s: %d workers, admin on %s", __version__, len(workers), config.listen.admin)
            async with asyncio.TaskGroup() as running:
                for worker in workers:
                    running.create_task(guard.keep("worker", partial(worker.run, stopping), str(worker.index)))
            reload_task.cancel()
            admin.should_exit = True
            await admin_task


def _write(directory: Path, text: str) -> None:
    """Put the configuration where workers find it, whole at any moment."""
    new = directory / "config.new"
    new.write_text(text, encoding="utf-8")
    new.replace(configuration_of(directory))
