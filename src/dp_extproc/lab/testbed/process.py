"""Run a command of this project as a child process: start it, wait for it, and stop it by its own pid."""

import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.tied_process import end_process, start_tied
from dp_extproc.lab.testbed.waiting import wait_until

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 10.0


class CommandProcess:
    """Run ``dp-extproc COMMAND ...`` as a child; a context manager.

    A started one is listening; whether it is ready beyond that is for the caller to wait for.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        listening_url: str,
        *,
        tls: ssl.SSLContext | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare, without starting.

        Args:
            arguments: The command and its options.
            listening_url: A cheap URL of it; any answer counts.
            tls: For an ``https`` URL.
            pause: Sleeps for so many seconds between two checks of a wait; an exception from it ends the wait.
        """
        self._arguments = list(arguments)
        self._listening_url = listening_url
        self._client = loopback.CLIENT if tls is None else loopback.client(tls=tls, keeps_connections=False)
        self._pause = pause
        self._directory = tempfile.TemporaryDirectory(prefix="dp-extproc-")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_listening()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._directory.cleanup()

    def start(self) -> None:
        """Start, also anew after :meth:`stop`; the log is appended."""
        argv = [sys.executable, "-m", "dp_extproc", *self._arguments]
        with self._log_path.open("ab") as log:
            self._process = start_tied(argv, log, log)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Stop, if it runs.

        Returns:
            Its exit status; negative for a signal. None if it did not run.
        """
        process, self._process = self._process, None
        return None if process is None else end_process(process, _STOP_SECONDS, number)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal without waiting for its effect."""
        if self._process is not None:
            self._process.send_signal(number)

    def wait_until_listening(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: It ended, or does not answer in time; the message ends with its log.
        """

        def answers() -> bool:
            if not self.is_running:
                raise RuntimeError(f"{self._arguments[0]} ended while it was starting:\n{self.log()}")
            self._client.get(self._listening_url, timeout=1.0)
            return True

        complaint = f"{self._arguments[0]} does not answer on {self._listening_url}:\n"
        wait_until(answers, _START_SECONDS, lambda: complaint + self.log(), self._pause)

    @property
    def pid(self) -> int:
        """Process id; only while it runs."""
        if self._process is None:
            raise RuntimeError(f"{self._arguments[0]} does not run")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Return its output so far."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def _log_path(self) -> Path:
        return Path(self._directory.name) / "log"
