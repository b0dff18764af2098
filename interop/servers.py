"""Run real SGLang engines on this machine, as :mod:`dp_extproc.lab.testbed` runs everything else."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import httpx

from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.tied_process import start_tied

SHIMS: Final = Path(__file__).parent / "shims"
START_SECONDS: Final = 1200.0
"""Seconds for a start; two engines start side by side in 75 s on two idle cores, and much later on busy ones."""
_POLL_SECONDS: Final = 0.5
_LAST: Final = 15
"""The lowest priority (``nice``)."""
_READY: Final = b"fired up and ready to roll"
"""Logged once its own first request has been answered (http_server.py)."""
CONTEXT_TOKENS: Final = 2048

_ENVIRONMENT: Final = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "|".join(["0-1"] * 8),  # without it SGLang divides the cores, and has none left
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONPATH": str(SHIMS),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A way to have two DP ranks."""

    name: str
    model: str
    """Folder of the tiny model."""
    options: tuple[str, ...]


SHAPES: Final = {
    "dp": Shape("plain DP", "llama", ("--dp-size", "2", "--sleep-on-idle")),
    "dp-attention": Shape(
        "DP attention", "qwen3", ("--tp", "2", "--dp-size", "2", "--enable-dp-attention", "--enable-dp-lm-head")
    ),
}


class RealEngine:
    """``sglang.launch_server`` with all its processes, in a process group of its own."""

    def __init__(self, role: str, shape: Shape, venv: Path, run: Path, *options: str) -> None:
        """Prepare an engine.

        Args:
            role: prefill, decode or unified.
            shape: Shape of its ranks.
            venv: Where SGLang is installed.
            run: Folder with the models; the logs are written there.
            options: Further options.
        """
        self.role = role
        self.port, self.bootstrap_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = run / f"{role}-{shape.model}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._argv = [
            str(venv / "bin" / "python"), "-W", "ignore", "-m", "sglang.launch_server",
            "--model-path", str(run / shape.model), "--load-format", "dummy", "--served-model-name", "tiny",
            "--device", "cpu", "--attention-backend", "torch_native", "--context-length", str(CONTEXT_TOKENS),
            "--max-total-tokens", "8192", "--max-running-requests", "64", "--enable-metrics",
            "--host", "127.0.0.1", "--port", str(self.port), *shape.options, *_ROLES[role], *options,
        ]  # fmt: skip
        if role == "prefill":
            self._argv += ["--disaggregation-bootstrap-port", str(self.bootstrap_port)]

    def start(self) -> None:
        environment = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        argv = [_program("env"), *environment, *self._argv]
        with self._log.open("wb") as log:
            self._process = start_tied(argv, log, log)

    def wait_until_ready(self) -> None:
        """Wait until the engine has answered a request of its own.

        Raises:
            RuntimeError: It ended, or is not ready in time; the message ends with its log.
        """
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while _READY not in (log := self._log.read_bytes()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.role} did not start:\n{log[-3000:].decode(errors='replace')}")
            time.sleep(_POLL_SECONDS)

    def restart_if_killed(self) -> None:
        """Start the engine again if it was killed."""
        if self._process is None:
            self.start()
            self.wait_until_ready()

    def kill(self) -> None:
        """End all its processes immediately, and wait until they are gone."""
        if self._process is None:
            return
        group = self._process.pid
        while members := _members_of(group):
            for pid in members:
                with _gone():
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.05)
        self._process.wait()
        self._process = None

    def lower_priority(self) -> None:
        """Lower its priority, because idle schedulers spin, and delay an engine that starts beside them."""
        assert self._process is not None
        for pid in _members_of(self._process.pid):
            with _gone():
                os.setpriority(os.PRIO_PROCESS, pid, _LAST)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def loads(self) -> list[dict[str, Any]]:
        """Return /v1/loads, by rank."""
        page = httpx.get(f"{self.url}/v1/loads", timeout=10).raise_for_status().json()
        return sorted(page["loads"], key=lambda each: int(each["dp_rank"]))

    def computed(self) -> list[int]:
        """Return how many tokens each rank has computed: of prompts on prefill, of output on decode."""
        if self.role == "prefill":
            return [int(each["total_prefill_uncached_tokens"]) for each in self.loads()]
        return [int((each["decode_moments"] or [0])[-1]) for each in self.loads()]


_ROLES: Final[Mapping[str, Sequence[str]]] = {
    "unified": (),
    "prefill": (
        "--disaggregation-mode", "prefill", "--disaggregation-transfer-backend", "mooncake_tcp",
        "--disable-overlap-schedule",
    ),
    "decode": (
        "--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "mooncake_tcp",
        "--disaggregation-decode-retraction-backup", "cpu_tensor",
    ),
}  # fmt: skip


@contextmanager
def run_engines(*engines: RealEngine) -> Iterator[None]:
    """Start engines side by side, and end them whatever happens."""
    with ExitStack() as running:
        for engine in engines:
            running.enter_context(engine)
        for engine in engines:
            engine.wait_until_ready()
        yield


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not on the PATH")
    return found


def _members_of(group: int) -> list[int]:
    """List the processes of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with _gone():
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


@contextmanager
def _gone() -> Iterator[None]:
    """Let a process end by itself meanwhile."""
    with suppress(ProcessLookupError, FileNotFoundError):
        yield
