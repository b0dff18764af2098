"""The context of a worker process: its index, its parent, and its share of the configuration."""

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
    """What a worker process gets from its parent."""

    index: int
    control_pipe: int
    """Descriptor of a pipe from the parent. A byte requests a reload; its end means that the parent has ended."""
    directory: Path
    """Private directory of the parent and its worker processes, with their sockets and the configuration in use."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text that :attr:`argument` returns."""
        index, control_pipe, directory = text.split(":", 2)
        return cls(int(index), int(control_pipe), Path(directory))

    @property
    def argument(self) -> str:
        """The context as a text for the command line."""
        return f"{self.index}:{self.control_pipe}:{self.directory}"

    @property
    def admin_socket(self) -> Path:
        """Socket at which the parent reads the pages of the worker process."""
        return self.directory / f"admin-{self.index}"

    def watch_parent(self, *, on_reload: Callable[[], None], on_exit: Callable[[], None]) -> None:
        """Call *on_reload* when the parent requests a reload, and *on_exit* when it has ended."""
        loop = asyncio.get_running_loop()

        def read() -> None:
            if os.read(self.control_pipe, _READ_BYTES):
                on_reload()
            else:
                loop.remove_reader(self.control_pipe)
                on_exit()

        loop.add_reader(self.control_pipe, read)

    def __str__(self) -> str:
        return f"worker {self.index}"


def local_bus(directory: Path) -> SyncSettings:
    """Return the bus between worker processes, for a file without the section ``sync``.

    Raises:
        pydantic.ValidationError: The path is too long for a Unix socket.
    """
    return SyncSettings.model_validate({"url": f"unix://{directory / _BUS}"})


def worker_config(config: Config, context: WorkerContext | None) -> Config:
    """Return the configuration of one worker process, with a port of its own and a bus to the others."""
    if context is None:
        return config
    listen = config.listen
    own = {
        "grpc": listen.grpc.shifted(context.index),
        "advertise": None if listen.advertise is None else listen.advertise.shifted(context.index),
    }
    sync = config.sync or local_bus(context.directory)
    return config.model_copy(update={"listen": listen.model_copy(update=own), "sync": sync})
