"""Run the routers of the contenders as processes."""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_path
from typing import Any, Final

import httpx

from bench.balance.contenders import Contender, Ours, Smg
from bench.balance.engines import Engines
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.lab.testbed.tied_process import end_process, start_tied
from dp_extproc.lab.testbed.waiting import wait_until

INTERVAL: Final = 1.0
"""Seconds between two reads of the engines' load by dp-extproc; the default."""
_READY_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Router:
    """A running router."""

    url: str
    """The address for requests."""
    pids: Sequence[int]


@contextmanager
def run_router(contender: Contender, engines: Engines, time_scale: float) -> Iterator[Router]:
    """Run a contender's router in front of the engines until it is ready.

    Args:
        contender: The router and its settings.
        engines: The running engines.
        time_scale: Time scale of the engines, which also scales the intervals of the router.
    """
    run = (
        _run_ours(contender, engines, time_scale)
        if isinstance(contender, Ours)
        else _run_smg(contender, engines, time_scale)
    )
    with run as router:
        yield router


@contextmanager
def _run_ours(contender: Ours, engines: Engines, time_scale: float) -> Iterator[Router]:
    interval = INTERVAL * time_scale
    load: dict[str, Any] = {
        "signal": contender.signal,
        "interval": f"{interval * 1000:.0f}ms",
        "stale_after": f"{interval * 5000:.0f}ms",
    }
    pool: dict[str, Any] = {
        "models": ["*"],
        "prefill": {"endpoints": [engine.url for engine in engines.prefill]},
        "decode": {"endpoints": [engine.url for engine in engines.decode]},
        "policy": dict(contender.policy),
    }
    with ServiceProcess(write_config([pool], load=load)) as service, EnvoyProcess(service.config) as envoy:
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Router(envoy.url, [service.pid, envoy.pid])


@contextmanager
def _run_smg(contender: Smg, engines: Engines, time_scale: float) -> Iterator[Router]:
    port, metrics_port = free_ports(2)
    url = f"http://127.0.0.1:{port}"
    argv = [
        *(_find_smg(), "launch", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warn"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port), "--pd-disaggregation"),
        *("--policy", contender.policy, *contender.flags),
        *("--load-monitor-interval", str(max(1, round(contender.interval * time_scale)))),
    ]
    for engine in engines.prefill:
        argv += ["--prefill", engine.url, str(engine.bootstrap_port)]
    for engine in engines.decode:
        argv += ["--decode", engine.url]
    with tempfile.TemporaryDirectory(prefix="dp-extproc-smg-") as directory:
        log = Path(directory) / "log"
        with log.open("wb") as output:
            process = start_tied(argv, output, output)
        try:
            _wait_until_ready(url, process, log)
            yield Router(url, [process.pid])
        finally:
            end_process(process, _STOP_SECONDS)


def _find_smg() -> str:
    path = Path(get_path("scripts")) / "smg"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run 'make balance', which installs what the comparison needs")
    return str(path)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    def complaint() -> str:
        return f"smg is not ready:\n{log.read_text(encoding='utf-8', errors='replace')}"

    def is_ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(complaint())
        return loopback.CLIENT.get(f"{url}/readiness").status_code == httpx.codes.OK

    wait_until(is_ready, _READY_SECONDS, complaint)
