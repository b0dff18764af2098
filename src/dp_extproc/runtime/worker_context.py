"""One of several workers: its place among them, and how it hears from its parent."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from dp_extproc.config import Config, SyncSettings

_BUS: Final = "bus"
_READ_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Which worker a process is."""

    index: int
    lifeline: int
    """Descriptor of a pipe. A byte in it says that the configuration has changed, its end that the parent has ended."""
    directory: Path
    """Of the parent and its workers alone: their sockets, and the configuration in use."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what :attr:`argument` wrote."""
        index, lifeline, directory = text.split(":", 2)
        return cls(int(index), int(lifeline), Path(directory))

    @property
    def argument(self) -> str:
        """Write it for the command line."""
        return f"{self.index}:{self.lifeline}:{self.directory}"

    @property
    def admin_socket(self) -> Path:
        """Where the worker shows its pages to the parent."""
        return self.directory / f"admin-{self.index}"

    def listen_to_parent(self, *, told: Callable[[], None], gone: Callable[[], None]) -> None:
        """Call back when the parent has something to tell, and when it has ended."""
        loop = asyncio.get_running_loop()

        def read() -> None:
            if os.read(self.lifeline, _READ_BYTES):
                told()
            else:
                loop.remove_reader(self.lifeline)
                gone()

        loop.add_reader(self.lifeline, read)

    def __str__(self) -> str:
        return f"worker {self.index}"


def bus_of(directory: Path) -> SyncSettings:
    """Give the bus between workers that are not told of another one.

    Raises:
        pydantic.ValidationError: The path is too long for a Unix socket.
    """
    return SyncSettings.model_validate({"url": f"unix://{directory / _BUS}"})


def seat_config(config: Config, seat: WorkerContext | None) -> Config:
    """Give the configuration of one worker: a port of its own, and a bus to the others."""
    if seat is None:
        return config
    listen = config.listen
    own = {
        "grpc": listen.grpc.shifted(seat.index),
        "advertise": None if listen.advertise is None else listen.advertise.shifted(seat.index),
    }
    sync = config.sync or bus_of(seat.directory)
    return config.model_copy(update={"listen": listen.model_copy(update=own), "sync": sync})
