"""A bus between processes of one machine: each has a datagram socket in a common directory, and sends to all others.

1. A process has one sending socket for each receiver. Datagrams that are not read yet count against the sender's
   buffer, so with one socket for all a stopped process would block messages between the others.
2. The sockets are read and written here, not by asyncio's datagram transports. uvloop's transport prints errors of
   queued datagrams to stdout, and both drop the newest message at a full queue, not the oldest.
"""

import asyncio
import contextlib
import errno
import socket
from collections import deque
from pathlib import Path
from typing import Final

from dp_extproc.sync.messages import MAX_EVENT_BYTES, MAX_FRAME_BYTES
from dp_extproc.sync.transport.bus import Listener, keep_up

_SUFFIX: Final = ".sock"
_SCAN_SECONDS: Final = 0.1
"""Seconds between two scans of the directory."""
_MAX_WAITING: Final = 256
"""Bound on the messages that wait for a process that does not read, beside those that Linux keeps: 10 or more
(``net.unix.max_dgram_qlen``)."""
_BUFFER: Final = 1 << 18
"""Bytes of a sender's buffer: two of the largest messages. Linux grants less if ``net.core.wmem_max`` is less."""
_AT_ONCE: Final = 64
"""Bound on the messages that are read before other tasks of the process go on."""
_GONE: Final = (errno.ECONNREFUSED, errno.ENOENT, errno.ENOTCONN)
"""Errors of a socket whose process has ended."""


class UnixBus:
    """Sends through sockets of a directory. Implements :class:`dp_extproc.sync.transport.bus.Bus`."""

    def __init__(self, directory: Path, replica: str) -> None:
        """Prepare, without making files. The directory is common to all processes; it is made if need be."""
        self._lost = 0
        self._directory = directory
        self._own = directory / (replica + _SUFFIX)
        self._receivers: dict[Path, _Receiver] = {}
        self._scanned_at = float("-inf")
        self.problem: str | None = None
        """See :attr:`dp_extproc.sync.transport.bus.Bus.problem`, as of the last scan."""

    @property
    def lost(self) -> int:
        return self._lost + sum(receiver.lost for receiver in self._receivers.values())

    def send(self, message: bytes) -> None:
        if asyncio.get_running_loop().time() - self._scanned_at >= _SCAN_SECONDS:
            self._scan()
        for path, receiver in list(self._receivers.items()):
            receiver.send(message)
            if receiver.is_gone:
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
                    await asyncio.sleep(_SCAN_SECONDS)
                    if not self._own.exists():  # no process finds this one any more
                        raise FileNotFoundError(f"somebody has removed the socket {self._own}")
            finally:
                loop.remove_reader(inbox)
                self._own.unlink(missing_ok=True)
                for path in list(self._receivers):
                    self._drop(path)

    def _scan(self) -> None:
        self._scanned_at = asyncio.get_running_loop().time()
        problems = []
        try:
            found = {path for path in self._directory.iterdir() if path.suffix == _SUFFIX} - {self._own}
        except OSError as error:  # those that were found before still get messages
            found = set(self._receivers)
            if error.errno not in _GONE:  # the directory comes with the next session
                problems.append(f"{self._directory}: {error.strerror}")
        for path in self._receivers.keys() - found:
            self._drop(path)
        for path in sorted(found - self._receivers.keys()):
            try:
                self._receivers[path] = _Receiver(path)
            except OSError as error:
                if error.errno in _GONE:  # its process has ended without removing it
                    path.unlink(missing_ok=True)
                else:
                    problems.append(f"{path}: {error.strerror or error}")
        self.problem = "; ".join(problems) or None

    def _drop(self, path: Path) -> None:
        receiver = self._receivers.pop(path)
        self._lost += receiver.lost
        receiver.close()
        if receiver.is_gone:
            path.unlink(missing_ok=True)


class _Receiver:
    """The way to one other process, with the messages that it has not taken yet."""

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
        if len(self._waiting) == _MAX_WAITING:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(message)
        if len(self._waiting) == 1:  # else its socket is full
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
            listener.receive(inbox.recv(MAX_EVENT_BYTES + MAX_FRAME_BYTES + 1))
