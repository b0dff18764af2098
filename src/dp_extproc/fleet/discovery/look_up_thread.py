"""Runs look-ups that block in threads of their own.

``getaddrinfo`` blocks while DNS servers do not answer: by default 5 seconds, twice, for each of them and for each
search domain. A pool of threads would fill up with such calls, that of uvloop too, and would hold up the end of the
process. So each name has one thread at most, which ends with the process.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

from dp_extproc.fleet.discovery.answers import Answer, LookUpError


class LookUpThread:
    """Looks up a name by a function that may block: a :class:`dp_extproc.fleet.discovery.answers.Resolver`."""

    def __init__(self, name: str, call: Callable[[], Answer]) -> None:
        """Set up. An exception of *call* is a look-up that has failed."""
        self._name = name
        self._call = call
        self._running: asyncio.Future[Answer | Exception] | None = None

    async def look_up(self) -> Answer:
        """Give all present addresses. If the last call still hangs, its result is awaited and no other call is made."""
        if self._running is None:
            result: asyncio.Future[Answer | Exception] = asyncio.get_running_loop().create_future()
            try:
                Thread(target=self._run, args=(result,), name=f"look up {self._name}", daemon=True).start()
            except RuntimeError as error:  # the machine has no threads left
                raise LookUpError(f"{self._name} cannot be resolved: {error}") from None
            self._running = result
        found = await asyncio.shield(self._running)
        self._running = None
        if isinstance(found, Exception):
            raise LookUpError(f"{self._name} cannot be resolved: {found or type(found).__name__}")
        return found

    def _run(self, result: "asyncio.Future[Answer | Exception]") -> None:
        found: Answer | Exception
        try:
            found = self._call()
        except Exception as error:  # noqa: BLE001 - an answer, however odd, raises no other exception
            found = error
        with suppress(RuntimeError):  # the event loop was closed meanwhile
            result.get_loop().call_soon_threadsafe(result.set_result, found)
