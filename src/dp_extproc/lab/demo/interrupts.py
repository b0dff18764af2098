"""End a command after SIGINT or SIGTERM, at points where nothing is left half done.

1. The signal handler never raises. An exception between any two instructions is lost in callbacks whose exceptions
   Python only prints, such as those of weak references. It leaves imports and temporary files half done.
2. An interrupt takes effect at safe points: :meth:`Interrupts.check`, :meth:`Interrupts.pause`,
   :meth:`Interrupts.wait` and :meth:`Interrupts.run`.
3. Output does not block past a signal: from then on, text that the reader does not take is dropped.
"""

import asyncio
import io
import select
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_LOOK_AGAIN: Final = 0.1
"""Seconds between two looks for a signal while nothing else happens; an interrupt is late by as much."""


class Interrupts:
    """Note the first signal, and raise KeyboardInterrupt at the next safe point. Later signals have no effect."""

    def __init__(self) -> None:
        """Prepare; :meth:`installed` listens."""
        self.number: signal.Signals | None = None
        """The first signal that came."""
        self._is_meant = False
        self._cancel: Callable[[], None] | None = None

    @property
    def status(self) -> int:
        """Exit status, by the custom of shells: 128 and the number of the signal; 0 when none came, or it was meant."""
        return 0 if self.number is None or self._is_meant else 128 + self.number

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Listen to the signals; only in the main thread.

        After a signal the process is about to end. The handlers stay then, so that a second signal does not end it
        before everything is stopped.
        """
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            if self.number is None:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def check(self) -> None:
        """Mark a safe point.

        Raises:
            KeyboardInterrupt: A signal came.
        """
        if self.number is not None:
            raise KeyboardInterrupt

    def pause(self, seconds: float) -> None:
        """Sleep for so many seconds, which are few, as a safe point.

        Raises:
            KeyboardInterrupt: A signal came.
        """
        time.sleep(seconds)
        self.check()

    def wait(self) -> NoReturn:
        """Wait for a signal.

        Raises:
            KeyboardInterrupt: It came.
        """
        while True:
            self.pause(_LOOK_AGAIN)

    def invite(self) -> None:
        """Make a signal the intended end of the program from now on; call this before the user is asked for one."""
        self._is_meant = self.number is None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in a loop of its own; a signal cancels it, and the loop is closed in order.

        Raises:
            KeyboardInterrupt: A signal came.
        """

        async def cancellable() -> T:
            task, loop = asyncio.current_task(), asyncio.get_running_loop()
            assert task is not None  # noqa: S101 - a coroutine always runs in one

            def cancel() -> None:
                loop.call_soon_threadsafe(task.cancel)

            self._cancel = cancel
            try:
                if self.number is not None:
                    raise asyncio.CancelledError
                return await work
            finally:
                self._cancel = None
                work.close()

        try:
            result = asyncio.run(cancellable())
        except asyncio.CancelledError:
            self.check()
            raise
        self.check()
        return result

    def output(self, file: IO[str]) -> IO[str]:
        """Open the descriptor of a text file once more, for text that may be dropped after a signal.

        Returns:
            The same file, if it has no descriptor.
        """
        try:
            output = _Output(file.fileno(), self)
        except io.UnsupportedOperation:
            return file
        encoding, errors = getattr(file, "encoding", None), getattr(file, "errors", None)
        return io.TextIOWrapper(output, encoding, errors, write_through=True)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            return
        self.number = signal.Signals(number)
        if self._cancel is not None:
            self._cancel()


class _Output(io.FileIO):
    """Write to a descriptor as soon as there is room; after a signal, drop what finds none."""

    def __init__(self, descriptor: int, interrupts: Interrupts) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._interrupts = interrupts

    def write(self, data: "ReadableBuffer") -> int:
        left = whole = memoryview(data)
        while left and self._has_room():
            left = left[super().write(left[: select.PIPE_BUF]) :]  # a pipe with room takes so much at once
        return len(whole)

    def _has_room(self) -> bool:
        while True:
            _, writable, _ = select.select([], [self], [], _LOOK_AGAIN)
            if writable or self._interrupts.number is not None:
                return bool(writable)


def run_until_interrupted(console: Console, work: Callable[[Interrupts], None]) -> int:
    """Do the work of a command.

    Returns:
        Its exit status: 0; 1 after a printed failure to start or reach something; 130 after SIGINT, 143 after SIGTERM.
    """
    interrupts = Interrupts()
    console.file = interrupts.output(console.file)
    try:
        with interrupts.installed():
            work(interrupts)
    except (OSError, RuntimeError) as error:
        if interrupts.number is None:  # else it is a consequence
            console.print(f"[bold]Cannot go on:[/] {escape(str(error))}", highlight=False)
            return 1
    except KeyboardInterrupt:
        pass
    if interrupts.number is not None:
        console.print("stopped")
    return interrupts.status
