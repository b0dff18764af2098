"""SIGINT and SIGTERM: they end the program where it can be ended, with nothing left half done."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, NoReturn, Self, TypeVar

from rich.console import Console
from rich.markup import escape

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Turns the first signal into KeyboardInterrupt, and is deaf to all that follow: it is stopping already.

    Python would raise KeyboardInterrupt between any two instructions: also behind the start of a process and before
    it is known, or in the middle of a stop. :meth:`held` puts the interrupt off until such a part is over.
    """

    def __init__(self) -> None:
        """Prepare; :meth:`installed` listens."""
        self.number: signal.Signals | None = None
        """The first signal that came."""
        self._raised = False
        self._is_meant = False
        self._holds = 0
        self._cancel: Callable[[], None] | None = None

    @property
    def status(self) -> int:
        """Exit status, by the custom of shells: 128 and the number of the signal; 0 when none came, or it was meant."""
        return 0 if self.number is None or self._is_meant else 128 + self.number

    @contextmanager
    def installed(self) -> Iterator[Self]:
        """Listen to the signals; only in the main thread.

        When one came the process is about to end, and stays deaf to others: none shall spoil its last moments.
        """
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield self
        finally:
            if self.number is None:
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put an interrupt off until the end of the block.

        Raises:
            KeyboardInterrupt: At the end of the block, if a signal came meanwhile.
        """
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._raise_if_due()

    def invite(self) -> None:
        """From now on a signal is the way in which the program is meant to end; call it before you tell so."""
        self._is_meant = self.number is None

    @staticmethod
    def wait() -> NoReturn:
        """Wait for a signal.

        Raises:
            KeyboardInterrupt: It came.
        """
        while True:
            signal.pause()

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

        with self.held():
            try:
                return asyncio.run(cancellable())
            except asyncio.CancelledError:
                if self.number is None:
                    raise
                raise self._interrupt() from None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            return
        self.number = signal.Signals(number)
        if self._cancel is not None:
            self._cancel()
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self.number is not None and not self._raised and not self._holds:
            raise self._interrupt()

    def _interrupt(self) -> KeyboardInterrupt:
        self._raised = True
        return KeyboardInterrupt()


def run_until_interrupted(console: Console, work: Callable[[Interrupts], None]) -> int:
    """Do the work of a command.

    Returns:
        Its exit status: 0; 1 when something cannot be started or reached, which is told; 130 after SIGINT, 143 after
        SIGTERM.
    """
    interrupts = Interrupts()
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
        _end_by_status()
        console.print("stopped")
    return interrupts.status


def _end_by_status() -> None:
    """Let the process end with the status that it returns, and not by SIGINT.

    CPython notes a KeyboardInterrupt that leaves code executed from a string, such as the methods that dataclasses
    write, and then ends by SIGINT, although the exception was dealt with. Executing a string takes the note back.
    """
    exec("")  # noqa: S102 - it executes nothing
