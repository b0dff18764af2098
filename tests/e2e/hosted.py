"""Many strict engines in one thread, for tests of the requests that engines receive, in which no engine has to die."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import uvloop

from dp_extproc.lab.engine.api.app import Server
from dp_extproc.lab.engine.api.faults import Fault
from dp_extproc.lab.engine.command import parse_settings
from dp_extproc.lab.testbed.ports import free_row

_START_SECONDS = 30.0


@dataclass(slots=True)
class HostedEngine:
    """One hosted engine, with the methods of :class:`dp_extproc.lab.testbed.engine.EngineProcess`."""

    server: Server
    port: int
    bootstrap_port: int
    killed_by: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def requests(self) -> list[dict[str, Any]]:
        """List the received requests, without the service's probe of header overrides."""
        assert not self.killed_by, self.killed_by
        received: list[dict[str, Any]] = list(self.server.journal.show())
        return [each for each in received if each["headers"].get("x-override-routed-dp-rank") != "probe"]

    def forget(self) -> None:
        self.server.journal.clear()

    def fault(self, **faults: Fault) -> None:
        """Inject faults that do not need the event loop: none that opens or closes ports, or that hangs."""
        self.server.faults.active.update(faults)


@dataclass(slots=True)
class HostedEngines:
    """A context manager that runs engines; they are added before it is entered."""

    engines: list[HostedEngine] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None
    _stop: asyncio.Event | None = None

    def add(self, *options: str, listeners: int = 1, build: Callable[..., Server] = Server) -> HostedEngine:
        """Add an engine with the options of ``dp-extproc engine``, except for ports; *build* makes it."""
        taken = {port for each in self.engines for port in (each.port, each.bootstrap_port)}
        while (port := free_row(listeners + 1)) in taken or port + listeners in taken:
            pass
        bootstrap_port = port + listeners
        settings = parse_settings([*options, "--port", str(port), "--bootstrap-port", str(bootstrap_port)])
        killed_by: list[str] = []
        self.engines.append(HostedEngine(build(settings, kill=killed_by.append), port, bootstrap_port, killed_by))
        return self.engines[-1]

    def close(self, engine: HostedEngine) -> None:
        """Close the ports of one engine, as if its process had ended."""
        assert self._loop is not None
        for listener in engine.server.listeners.values():
            asyncio.run_coroutine_threadsafe(listener.close(), self._loop).result(_START_SECONDS)

    def __enter__(self) -> Self:
        """Run the engines, and wait until all listen."""
        running: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run(running)), name="engines")
        self._thread.start()
        running.result(_START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None and self._stop is not None and self._thread is not None  # noqa: PT018 - all or none
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self, running: "Future[None]") -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with AsyncExitStack() as stack:
            try:
                await self._start(stack, [each.server for each in self.engines])
            except BaseException as error:
                running.set_exception(error)
                raise
            running.set_result(None)
            await self._stop.wait()
            listeners = [listener for each in self.engines for listener in each.server.listeners.values()]
            await asyncio.gather(*(listener.close() for listener in listeners))

    async def _start(self, stack: AsyncExitStack, servers: Sequence[Server]) -> None:
        for server in servers:
            await stack.enter_async_context(server.engine.running())
            for listener in server.listeners.values():
                await listener.open()
