"""The bus between processes of one host: each has a datagram socket in a common directory, and sends to all others.

To each of the others it sends from a socket of its own. Datagrams that are not read yet count against the sender's
buffer, so with one socket for all a process that is stopped would keep its peers from each other.
"""

import asyncio
import contextlib
import errno
import socket
from collections import deque
from pathlib import Path
from typing import Final

from dp_extproc.sync.messages import FRAME_BYTES, MOST_BYTES
from dp_extproc.sync.transport.bus import Listener, keep_up

_SUFFIX: Final = ".sock"
_LOOK_AROUND: Final = 0.1
"""Seconds between two looks for others."""
_MOST_WAITING: Final = 256
"""Messages for one that does not read; Linux itself keeps 10 or more (``net.unix.max_dgram_qlen``)."""
_BUFFER: Final = 1 << 18
"""Bytes, so that two of the largest messages are on their way. Linux grants less if ``net.core.wmem_max`` is less."""
_AT_ONCE: Final = 64
_GONE: Final = (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTCONN)


class UnixBus:
    """Implements :class:`dp_extproc.sync.transport.bus.Bus`."""

    def __init__(self, directory: Path, replica: str) -> None:
        """Prepare, without making anything.

        Args:
            directory: Common to the processes that tell each other; is made if need be.
            replica: The name of this one's socket.
        """
        self._lost = 0
        self._directory = directory
        self._own = directory / (replica + _SUFFIX)
        self._others: dict[Path, _Correspondent] = {}
        self._looked = float("-inf")

    @property
    def lost(self) -> int:
        return self._lost + sum(other.lost for other in self._others.values())

    def send(self, message: bytes) -> None:
        if asyncio.get_running_loop().time() - self._looked >= _LOOK_AROUND:
            self._look_around()
        for path, other in list(self._others.items()):
            other.send(message)
            if other.is_gone:
                self._drop(path)

    async def run(self, listener: Listener) -> None:
        await keep_up(lambda: self._session(listener), listener.down)

    async def _session(self, listener: Listener) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as inbox:
            self._own.unlink(missing_ok=True)
            inbox.bind(str(self._own))
            loop.add_reader(inbox, _read, inbox, listener)
            try:
                listener.up()
                while True:
                    await asyncio.sleep(_LOOK_AROUND)
                    if not self._own.exists():  # nobody can find us any more
                        raise FileNotFoundError(f"somebody has removed the socket {self._own}")
            finally:
                loop.remove_reader(inbox)
                self._own.unlink(missing_ok=True)
                for path in list(self._others):
                    self._drop(path)

    def _look_around(self) -> None:
        self._looked = asyncio.get_running_loop().time()
        found = set(self._directory.glob("*" + _SUFFIX)) - {self._own}
        for path in self._others.keys() - found:
            self._drop(path)
        for path in found - self._others.keys():
            try:
                self._others[path] = _Correspondent(path)
            except OSError as error:
                if error.errno in _GONE:  # its process has ended without removing it
                    path.unlink(missing_ok=True)

    def _drop(self, path: Path) -> None:
        other = self._others.pop(path)
        self._lost += other.lost
        other.close()
        if other.is_gone:
            path.unlink(missing_ok=True)


class _Correspondent:
    """One other process, and what it has not taken yet."""

    def __init__(self, path: Path) -> None:
        self.lost = 0
        self.is_gone = False
        self._waiting: deque[bytes] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def send(self, message: bytes) -> None:
        if len(self._waiting) == _MOST_WAITING:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(message)
        if len(self._waiting) == 1:  # else it is known to take nothing now
            self._flush()

    def close(self) -> None:
        asyncio.get_running_loop().remove_writer(self._socket)
        self._socket.close()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            try:
                self._socket.send(self._waiting[0])
            except BlockingIOError:
                loop.add_writer(self._socket, self._flush)
                return
            except OSError as error:
                self.lost += 1
                if error.errno in _GONE:
                    self.is_gone = True
                    break
            self._waiting.popleft()
        loop.remove_writer(self._socket)


def _read(inbox: socket.socket, listener: Listener) -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(_AT_ONCE):
            listener.receive(inbox.recv(MOST_BYTES + FRAME_BYTES + 1))
