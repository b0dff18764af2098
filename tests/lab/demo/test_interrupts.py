"""Send signals to a running demo, as a terminal and as ``kill`` do: nothing runs on, and nothing is left."""

import asyncio
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from dp_extproc.cli import main
from dp_extproc.lab.demo.interrupts import Interrupts
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.waiting import wait_until
from patience import wait_for
from sessions import processes_of

_LONG = ("--requests", "3000", "--time-scale", "3")
"""Takes minutes: none of the tests waits for its end."""
_SHORT = ("--requests", "4", "--time-scale", "0.2")
_SAMPLE_SECONDS = 120.0
_DEBUG_PORT = re.compile(rb"--debug-port\0(\d+)\0")


@dataclass
class Demo:
    """A running demo, as the leader of a session that has all its children."""

    process: subprocess.Popen[bytes]
    directory: Path
    printed: bytes = b""
    seen: set[int] = field(default_factory=set)
    """Processes of the session that were there at some time."""

    def session(self) -> set[int]:
        """Find the running processes of the session."""
        found = processes_of(self.process.pid)
        self.seen |= found
        return found

    def read_until(self, text: str) -> None:
        """Read the output until a text is there."""
        assert self.process.stdout is not None
        while text.encode() not in self.printed:
            piece = os.read(self.process.stdout.fileno(), 1)
            assert piece, f"it ended without {text!r}: {self.printed.decode()}"
            self.printed += piece

    def arrived(self) -> int:
        """Count the requests that have reached its engines."""
        counts = []
        for pid in self.session():
            if port := _DEBUG_PORT.search(Path(f"/proc/{pid}/cmdline").read_bytes()):
                url = f"http://127.0.0.1:{int(port[1])}/debug/requests"
                counts.append(loopback.CLIENT.get(url, params={"after": "9" * 18}).json()["count"])
        return sum(counts)

    def end(self) -> int:
        """Read to the end, and wait for the process."""
        rest, _ = self.process.communicate(timeout=_SAMPLE_SECONDS)
        self.printed += rest
        return self.process.returncode


@contextmanager
def _demo(directory: Path, *options: str, pipe: int | None = None) -> Iterator[Demo]:
    read, write = os.pipe()
    if pipe is not None:
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "dp_extproc", "demo", *options],
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(directory)},
    )
    os.close(write)
    process.stdout = os.fdopen(read, "rb", buffering=0)
    demo = Demo(process, directory)
    try:
        yield demo
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def _starting(demo: Demo) -> None:
    demo.read_until("Starting")


def _engines_starting(demo: Demo) -> None:
    wait_for(lambda: len(demo.session()) >= 3, _SAMPLE_SECONDS)


def _router_starting(demo: Demo) -> None:
    demo.read_until("1 of 4")
    wait_for(lambda: len(demo.session()) >= 6, _SAMPLE_SECONDS)


def _arrivals(least: int) -> Callable[[Demo], None]:
    def wait(demo: Demo) -> None:
        demo.read_until("1 of 4")
        wait_for(lambda: _quietly(demo) >= least, _SAMPLE_SECONDS)

    return wait


def _quietly(demo: Demo) -> int:
    try:
        return demo.arrived()
    except (OSError, httpx.TransportError):  # one of them has just begun or ended
        return 0


def _between_turns(demo: Demo) -> None:
    demo.read_until("s to go")


def _kept(demo: Demo) -> None:
    demo.read_until("Ctrl-C ends it.")


def _interrupt_alone(demo: Demo) -> None:
    demo.process.send_signal(signal.SIGINT)


def _interrupt_all(demo: Demo) -> None:
    os.killpg(demo.process.pid, signal.SIGINT)


def _interrupt_twice(demo: Demo) -> None:
    _interrupt_all(demo)
    _interrupt_all(demo)


def _terminate(demo: Demo) -> None:
    demo.process.send_signal(signal.SIGTERM)


_WARMING_UP, _RUNNING = _arrivals(1), _arrivals(100)


@pytest.mark.parametrize(
    ("options", "phase", "send", "status"),
    [
        pytest.param(_LONG, _starting, _interrupt_all, 130, id="start-ctrl-c"),
        pytest.param(_LONG, _engines_starting, _interrupt_twice, 130, id="engines-start-ctrl-c-twice"),
        pytest.param(_LONG, _engines_starting, _terminate, 143, id="engines-start-sigterm"),
        pytest.param(_LONG, _router_starting, _interrupt_all, 130, id="router-starts-ctrl-c"),
        pytest.param(_LONG, _WARMING_UP, _interrupt_alone, 130, id="warm-up-sigint"),
        pytest.param(_LONG, _RUNNING, _interrupt_twice, 130, id="run-ctrl-c-twice"),
        pytest.param(_LONG, _RUNNING, _interrupt_alone, 130, id="run-sigint"),
        pytest.param(_LONG, _RUNNING, _terminate, 143, id="run-sigterm"),
        pytest.param(_SHORT, _between_turns, _interrupt_all, 130, id="between-turns-ctrl-c"),
        pytest.param((*_SHORT, "--keep"), _kept, _interrupt_all, 0, id="kept-ctrl-c"),
        pytest.param((*_SHORT, "--keep"), _kept, _terminate, 0, id="kept-sigterm"),
    ],
)
def test_signal_ends_the_demo_and_its_children(
    tmp_path: Path, options: tuple[str, ...], phase: Callable[[Demo], None], send: Callable[[Demo], None], status: int
) -> None:
    """In any phase: no process is left, no file, no traceback, and the status is what shells expect.

    A signal is the intended end of what --keep has left running, hence 0.
    """
    with _demo(tmp_path, *options) as demo:
        phase(demo)
        demo.session()
        send(demo)
        ended = demo.end()
        left = demo.session()
    printed = demo.printed.decode()

    assert left == set()
    assert len(demo.seen) > (phase is not _starting)
    assert "Traceback" not in printed
    assert "rror" not in printed
    assert ended == status
    assert printed.endswith("stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_signal_ends_the_demo_while_the_report_is_printed(tmp_path: Path) -> None:
    """The report waits for a reader that does not read; the engines still run then."""
    with _demo(tmp_path, *_SHORT, pipe=4096) as demo:
        demo.read_until("What each rank got")
        assert len(demo.session()) == 5
        _interrupt_all(demo)
        ended = demo.end()
        left = demo.session()
    printed = demo.printed.decode()

    assert left == set()
    assert ended == 130
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_interrupt_ends_a_command_quietly_before_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries take a second to import; Ctrl-C in that time prints no traceback either."""

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)

    assert main(["serve", "-c", "dp-extproc.yaml"]) == 130


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    """Listen in this process, and restore its handlers afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with Interrupts().installed() as listening:
        yield listening
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signal_takes_effect_at_the_next_safe_point(interrupts: Interrupts) -> None:
    """A process that has been started is noted before; later signals have no effect while it stops."""
    done = []

    def start() -> None:
        interrupts.check()
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("started")
        os.kill(os.getpid(), signal.SIGINT)
        done.append("noted")
        interrupts.check()

    with pytest.raises(KeyboardInterrupt):
        start()
    os.kill(os.getpid(), signal.SIGINT)
    done.append("stopped")

    assert done == ["started", "noted", "stopped"]
    assert interrupts.status == 128 + signal.SIGTERM


def test_signal_ends_the_wait_for_a_process(interrupts: Interrupts) -> None:
    """The wait is far from its timeout then, and checks no further."""
    asked = []

    def never() -> bool:
        asked.append("once")
        os.kill(os.getpid(), signal.SIGINT)
        return False

    with pytest.raises(KeyboardInterrupt):
        wait_until(never, 60, lambda: "it is not so", interrupts.pause)

    assert asked == ["once"]
    assert interrupts.status == 130


def test_interrupt_cancels_a_coroutine(interrupts: Interrupts) -> None:
    """Everything that it holds open is closed, and the loop ends before the interrupt is raised."""
    closed = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            closed.append(asyncio.current_task())

    with pytest.raises(KeyboardInterrupt):
        interrupts.run(work())

    assert len(closed) == 1
    assert interrupts.status == 130


def test_invited_signal_is_no_failure(interrupts: Interrupts) -> None:
    """Ctrl-C is the end of a demo that was kept, also when it comes before the wait."""
    interrupts.invite()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        interrupts.wait()

    assert interrupts.status == 0


def test_handlers_are_restored_without_a_signal() -> None:
    """A command that ended by itself leaves no trace in the process."""
    before = signal.getsignal(signal.SIGINT)
    with Interrupts().installed():
        assert signal.getsignal(signal.SIGINT) != before

    assert signal.getsignal(signal.SIGINT) == before


_COMMAND = """
import importlib, os, signal, sys, weakref
from rich.console import Console
from dp_extproc.lab.demo.interrupts import run_until_interrupted

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGTERM)

class Dying:
    def __del__(self):
        interrupt()

class Watched:
    pass
"""
"""Begin of a program that sends SIGTERM to itself; a test adds ``work``."""


def _run_command(directory: Path, *work: str) -> subprocess.CompletedProcess[str]:
    lines = "".join(f"    {line}\n" for line in work)
    end = "sys.exit(run_until_interrupted(Console(), work))\n"
    (directory / "program.py").write_text(f"{_COMMAND}\ndef work(interrupts):\n{lines}\n{end}")
    argv = [sys.executable, "-m", "program"]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=directory, timeout=_SAMPLE_SECONDS)


def test_interrupt_in_code_from_a_string_keeps_the_status(tmp_path: Path) -> None:
    """Libraries are imported while the demo starts, and those of dataclasses execute strings."""
    done = _run_command(tmp_path, "exec('interrupt()')")

    assert (done.returncode, done.stdout, done.stderr) == (143, "stopped\n", "")


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(("watched = Watched()", "watch = weakref.ref(watched, interrupt)", "del watched"), id="weakref"),
        pytest.param(("dying = Dying()", "del dying"), id="del"),
        pytest.param(("import interrupted_library",), id="import"),
    ],
)
def test_interrupt_does_not_raise_where_it_would_be_lost(tmp_path: Path, work: tuple[str, ...]) -> None:
    """Callbacks of Python go on without a traceback, and an import is not left half done."""
    (tmp_path / "interrupted_library.py").write_text("import __main__\n__main__.interrupt()\n")
    done = _run_command(tmp_path, *work, "print('whole', flush=True)", "interrupts.wait()")

    assert (done.returncode, done.stdout, done.stderr) == (143, "whole\nstopped\n", "")


def test_signal_ends_a_command_whose_output_is_never_read(tmp_path: Path) -> None:
    """Neither the rest of the report nor "stopped" waits for the reader."""
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from rich.console import Console\n"
        "from dp_extproc.lab.demo.interrupts import run_until_interrupted\n"
        "console = Console()\n"
        "sys.exit(run_until_interrupted(console, lambda _: console.print('report ' * 100_000)))\n"
    )
    argv = [sys.executable, "-m", "program"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"r"
        process.send_signal(signal.SIGINT)

        assert process.wait(_SAMPLE_SECONDS) == 130


def test_interrupt_ends_a_command_at_once_during_its_import(tmp_path: Path) -> None:
    """The signal itself ends the process where an exception would be printed and lost."""
    (tmp_path / "slow_command.py").write_text(
        "import os, signal, weakref\n"
        "class Watched: pass\n"
        "watched = Watched()\n"
        "watch = weakref.ref(watched, lambda _: os.kill(os.getpid(), signal.SIGINT))\n"
        "del watched\n"
    )
    (tmp_path / "program.py").write_text(
        "import signal, sys\n"
        "from dp_extproc.cli import main as entry\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "sys.modules['dp_extproc.cli.main']._COMMANDS['serve'] = ('slow_command', 'summary')\n"
        "sys.exit(entry(['serve']))\n"
    )
    argv = [sys.executable, "-m", "program"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=_SAMPLE_SECONDS)

    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
