"""Looks up a name as every program of this machine does: ``/etc/hosts``, name service switch, DNS with search domains.

``getaddrinfo`` blocks while DNS servers do not answer: by default 5 seconds, twice, for each of them and for each
search domain. A pool of threads would fill up with such calls, that of uvloop too, and would hold up the end of the
process. So each resolver has one thread at most, which ends with the process.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any, Final

from dp_extproc.fleet.discovery.answers import Address, Answer, LookUpError

_ABSENT: Final = frozenset({socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_ADDRFAMILY})
"""Codes of a look-up that has worked, of a name that has no address. All others are failures (``gai_strerror``)."""

_Found = list[tuple[Any, ...]] | OSError | UnicodeError


class SystemResolver:
    """Looks up the addresses of a name by ``getaddrinfo``, which gives no TTL and no SRV records."""

    def __init__(self, name: str, port: int, get: Callable[..., list[tuple[Any, ...]]] = socket.getaddrinfo) -> None:
        self._name = name
        self._port = port
        self._get = get
        self._running: asyncio.Future[_Found] | None = None

    async def look_up(self) -> Answer:
        """Give all present addresses. If the last call still hangs, its result is awaited and no other call is made."""
        if self._running is None:
            self._running = asyncio.get_running_loop().create_future()
            Thread(target=self._call, args=(self._running,), name=f"look up {self._name}", daemon=True).start()
        found = await asyncio.shield(self._running)
        self._running = None
        if isinstance(found, socket.gaierror) and found.errno in _ABSENT:
            return Answer()
        if isinstance(found, Exception):
            raise LookUpError(f"{self._name} cannot be resolved: {found}")
        # Of two families each engine would be there twice.
        families = {family for family, *_ in found}
        family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        return Answer(tuple(Address(str(each[4][0]), self._port) for each in found if each[0] == family))

    def _call(self, result: "asyncio.Future[_Found]") -> None:
        found: _Found
        try:
            found = self._get(self._name, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            found = error
        with suppress(RuntimeError):  # the event loop was closed meanwhile
            result.get_loop().call_soon_threadsafe(result.set_result, found)
