"""The parent of several worker processes: starts and restarts them, and serves their pages on one admin port."""

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
from dp_extproc.config import Config, ConfigSource
from dp_extproc.observability.admin import AdminServer
from dp_extproc.observability.merged_metrics import merge_pages
from dp_extproc.runtime.reload import Reloader
from dp_extproc.runtime.sockets import StartError, listen
from dp_extproc.runtime.worker_context import WorkerContext, local_bus

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 10.0
"""Seconds before a worker process is restarted, at first and at most."""
_STEADY_SECONDS: Final = 30.0
"""Seconds after which the end of a worker process starts a new series of pauses: it did not fail at its start."""
_MOST_DOUBLINGS: Final = 16
"""Most doublings of the pause that are computed. More would overflow after a thousand ends."""
_PAGE_SECONDS: Final = 2.0
"""Limit for reading a page of a worker process, in seconds."""
_RELOAD: Final = b"\n"
"""What the parent writes to a control pipe; see :class:`WorkerContext`."""
_PARENT: Final = "parent"
"""Value of the label ``process`` for the parent itself."""

_log = logging.getLogger(__name__)


def pause_before(ends: int) -> float:
    """Return the seconds before a restart after so many ends of a worker process in a row."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(ends - 1, _MOST_DOUBLINGS))


class _Worker:
    """One worker process and its restarts."""

    def __init__(self, index: int, directory: Path, log_level: str) -> None:
        self.index = index
        self.restarts = 0
        self._directory = directory
        self._log_level = log_level
        self._process: asyncio.subprocess.Process | None = None
        self._control_pipe: int | None = None
        admin_socket = WorkerContext(index, 0, directory).admin_socket
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(admin_socket)), base_url="http://worker", timeout=_PAGE_SECONDS
        )

    @property
    def pid(self) -> int | None:
        """Process id, or None while no process runs."""
        return None if self._process is None else self._process.pid

    async def run(self, stopping: asyncio.Event) -> None:
        """Start and restart the process until *stopping* is set and the process has ended."""
        ends = 0
        while not stopping.is_set():
            started = time.monotonic()
            try:
                end = f"has ended with status {await self._run_once(stopping)}"
            except OSError as error:  # the machine has no memory, processes or files left
                end = f"cannot be started ({error})"
            if stopping.is_set():
                break
            ends = 1 if time.monotonic() - started > _STEADY_SECONDS else ends + 1
            pause = pause_before(ends)
            _log.error("worker %d %s; starting it again in %.3g s", self.index, end, pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stopping.wait()
            self.restarts += 1
        await self._client.aclose()

    async def _run_once(self, stopping: asyncio.Event) -> int:
        own_end, self._control_pipe = os.pipe()
        context = WorkerContext(self.index, own_end, self._directory)
        argv = ["-m", "dp_extproc", "serve", "--config", str(config_copy(self._directory))]
        argv += ["--log-level", self._log_level, "--worker-context", context.argument]
        try:
            try:
                # In a process group of its own: a Ctrl-C in the terminal reaches the parent alone, which passes it on.
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, *argv, stdin=asyncio.subprocess.DEVNULL, pass_fds=[own_end], process_group=0
                )
            finally:
                os.close(own_end)
            if stopping.is_set():  # set while the process was being started
                self.signal(signal.SIGTERM)
            return await self._process.wait()
        finally:
            self._process = None
            os.close(self._control_pipe)
            self._control_pipe = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if one runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def reload(self) -> None:
        """Request a reload. A process that is just starting finds the request in the pipe."""
        if self._control_pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._control_pipe, _RELOAD)

    async def page(self, path: str) -> httpx.Response | None:
        """Read a page of the process; None if it does not respond, or with an error."""
        try:
            return (await self._client.get(path)).raise_for_status()
        except httpx.HTTPError:
            return None


class _Pages:
    """Pages of the admin port: those of all worker processes, and the parent's own metrics."""

    def __init__(self, workers: list[_Worker], reloader: Reloader, guard: Guard) -> None:
        self._workers = workers
        self._own = CollectorRegistry()
        self._own.register(reloader)
        self._own.register(self)
        self._shared = CollectorRegistry()
        """Metrics that worker processes have too."""
        self._shared.register(guard)

    async def metrics(self) -> bytes:
        pages = await self._all("/metrics")
        texts = {_PARENT: generate_latest(self._shared).decode()}
        texts |= {str(worker.index): page.text for worker, page in pages if page is not None}
        return generate_latest(self._own) + merge_pages(texts).encode()

    async def ready(self) -> bool:
        return any(page is not None for _, page in await self._all("/readyz"))

    async def loads(self) -> dict[str, Any]:
        """Return /loads of the first worker process that responds, and a list of all worker processes."""
        ready = {worker.index for worker, page in await self._all("/readyz") if page is not None}
        processes = [
            {"process": each.index, "pid": each.pid, "ready": each.index in ready, "restarts": each.restarts}
            for each in self._workers
        ]
        pages = [page.json() for _, page in await self._all("/loads") if page is not None]
        return {**(pages[0] if pages else {}), "worker_processes": processes}

    async def _all(self, path: str) -> list[tuple[_Worker, httpx.Response | None]]:
        return list(zip(self._workers, await asyncio.gather(*(each.page(path) for each in self._workers)), strict=True))

    def collect(self) -> Iterator[Metric]:
        """Collect the metrics that the parent alone has."""
        running = sum(worker.pid is not None for worker in self._workers)
        yield GaugeMetricFamily("dp_extproc_worker_processes", "Worker processes that run.", value=running)
        restarts = CounterMetricFamily(
            "dp_extproc_worker_process_restarts", "Times a worker process ended by itself.", labels=["process"]
        )
        for worker in self._workers:
            restarts.add_metric([str(worker.index)], worker.restarts)
        yield restarts


def config_copy(directory: Path) -> Path:
    """Return the path of the configuration in use. A restarted worker process must not read a rejected file."""
    return directory / "config.yaml"


async def serve_with_workers(count: int, config: Config, text: str, source: ConfigSource, log_level: str) -> None:
    """Serve with *count* worker processes until a signal, and until all of them have ended.

    *config* is the configuration in *text*, which *source* gave.

    Raises:
        StartError: The admin port is taken, or the path of the temporary directory is too long.
    """
    with tempfile.TemporaryDirectory(prefix="dp-extproc-") as name:
        directory = Path(name)  # readable for its user alone
        try:
            local_bus(directory)
        except ValidationError as error:
            raise StartError(f"{directory}: {error.errors()[0]['msg']}; set TMPDIR to a shorter one") from None
        _write(directory, text)
        workers = [_Worker(index, directory, log_level) for index in range(count)]

        def apply(_config: Config, text: str) -> None:
            _write(directory, text)
            for worker in workers:
                worker.reload()

        reloader = Reloader(source, text, config, apply)
        guard = Guard()
        admin = AdminServer(_Pages(workers, reloader, guard), listen(config.listen.admin, "listen.admin"))
        stopping = asyncio.Event()

        def stop(number: signal.Signals) -> None:
            stopping.set()
            for worker in workers:
                worker.signal(number)

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        loop.add_signal_handler(signal.SIGHUP, reloader.request)
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
    """Replace the copy of the configuration that worker processes read, in one step."""
    new = directory / "config.new"
    new.write_text(text, encoding="utf-8")
    new.replace(config_copy(directory))
