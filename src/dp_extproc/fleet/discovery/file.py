"""The source ``file``: endpoints in a file that another program may replace at any time."""

import asyncio
import stat
from pathlib import Path
from typing import Final

from dp_extproc.config.discovery import FileSettings
from dp_extproc.config.endpoints_file import FileEntry, parse_endpoints
from dp_extproc.engines.model import SourceKind
from dp_extproc.fleet.discovery.source import Member, SourceListener
from dp_extproc.settled import read_settled

_POLL_SECONDS: Final = 0.5
"""Seconds between two readings. A removed endpoint gets no request a second later; reading takes some 0.1 ms.

The text is read, and not watched: a ConfigMap is replaced through symbolic links, of which a watch of the file has no
event.
"""
_MAX_BYTES: Final = 1 << 20
"""Most bytes of the file; a thousand endpoints have some 100 kB."""


class FileSource:
    """Reports the entries of a file: when it has changed, and its mistake at each reading."""

    kind = SourceKind.FILE

    def __init__(self, settings: FileSettings) -> None:
        self._path = Path(settings.path)
        self.keep_for = settings.keep_for

    def __str__(self) -> str:
        return f"file {self._path}"

    async def run(self, listener: SourceListener) -> None:
        """Report until cancelled. Files are read and checked off the event loop."""
        text: str | None = None
        found: tuple[Member, ...] | str = ()
        while True:
            try:
                present = await read_settled(self._read, text)
            except ValueError as error:
                listener.failed(str(error))
            else:
                if present is None:  # it is read again at once
                    continue
                if present != text:
                    text, found = present, await asyncio.to_thread(_members, present)
                if isinstance(found, str):
                    listener.failed(found)
                else:
                    listener.snapshot(found)
            await asyncio.sleep(_POLL_SECONDS)

    def _read(self) -> str:
        """Read the text of the file.

        Raises:
            ValueError: It cannot be read, or is no text of an allowed size.
        """
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):  # reading a pipe might never end
                raise ValueError("is no regular file")
            with self._path.open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror or error}") from None
        if len(content) > _MAX_BYTES:
            raise ValueError(f"is larger than {_MAX_BYTES} bytes; split it in several files")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8") from None


def _members(text: str) -> tuple[Member, ...] | str:
    """Read the entries of a text, or return why they cannot be used."""
    try:
        return tuple(map(_member, parse_endpoints(text)))
    except ValueError as error:
        return str(error)


def _member(entry: FileEntry) -> Member:
    return Member(
        url=entry.url,
        host=entry.host,
        port=entry.port,
        state=entry.state,
        uid=entry.name or "",
        name=entry.name or "",
        group=entry.group,
        bootstrap_host=entry.bootstrap_host,
        bootstrap_port=entry.bootstrap_port,
        dp_size=entry.dp_size,
        dp_rank=entry.dp_rank,
    )
