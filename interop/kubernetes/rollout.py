"""The whole service against a real API server: all engines are replaced under load, and the API server dies."""

import re
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import FAST
from e2e.steady_load import LATE, Departures, SteadyLoad, steady_load
from interop.kubernetes.fleet import SLICES, Pod, create_service
from interop.kubernetes.source_cases import Rig
from patience import wait_for

ROLES = ("prefill", "decode")
_PATIENCE = 60.0


@dataclass(slots=True)
class Replica:
    """An engine and its pod."""

    role: str
    address: str
    engine: EngineProcess
    pod: Pod

    def start(self) -> None:
        """Start the engine, and report its pod as a kubelet does: running, and ready when its probe succeeds."""
        bootstrap_port = self.engine.bootstrap_port if self.role == "prefill" else None
        self.pod.create({"app": "qwen", "role": self.role}, self.engine.port, bootstrap_port)
        self.engine.start()
        self.pod.report(self.address, ready=False)
        self.engine.wait_until_listening()
        self.pod.report(self.address, ready=True)

    def is_idle(self) -> bool:
        return all(each["outcome"] != "running" for each in self.engine.requests())


def rolling_replacement(rig: Rig) -> None:
    """Replace all engines one after the other at 30 requests/s, then kill the API server, and start it again."""
    for role in ROLES:
        create_service(rig.cluster, f"qwen-{role}", {"app": "qwen"}, {"app": "qwen", "role": role})
    replicas = [
        [_replica(rig, role, generation, number) for role in ROLES for number in (1, 2)] for generation in (1, 2)
    ]
    pool = {"models": ["*"], **{role: {"kubernetes": {"service": f"qwen-{role}"}} for role in ROLES}}
    with ExitStack() as running:
        for replica in (*replicas[0], *replicas[1]):
            running.push(replica.engine)
        for replica in replicas[0]:
            replica.start()
        # After an outage the controller itself needs up to half a minute to return.
        wait_for(lambda: all(_ready_endpoints(rig, role) == 2 for role in ROLES), _PATIENCE)
        config = write_config([pool])
        _check(rig, config)
        service = running.enter_context(ServiceProcess(config))
        envoy = running.enter_context(EnvoyProcess(service.config))
        service.wait_until_fresh()
        service.wait_until_ready()
        began = time.monotonic()
        with steady_load(envoy.url) as load:
            departures = Departures()
            for old, new in zip(*replicas, strict=True):
                new.start()
                wait_for(lambda url=new.engine.url: url in _fresh(service), _PATIENCE)  # type: ignore[misc]
                _replace(old, load, departures)
            rig.report.add(
                "rolling replacement of all engines",
                f"{load.sent} requests in {time.monotonic() - began:.0f} s, failed: {_failed(load)}; requests that the "
                f"{departures.count} old engines got later than {LATE:.0f} s after the event: {len(departures.late)}",
                good=not _failed(load) and not departures.late,
            )
            rig.cluster.kill_api()
            before = load.sent
            load.go_on(10)
            kept = _fresh(service)
            rig.cluster.start_api()
            replicas[1][-1].pod.terminate()
            wait_for(lambda: replicas[1][-1].engine.url not in _fresh(service), _PATIENCE)
            load.go_on()
            rig.report.add(
                "API server killed under load",
                f"{load.sent - before} requests, failed: {_failed(load)}; {len(kept)} endpoints kept meanwhile; "
                "afterwards a terminating pod was left",
                good=not _failed(load) and len(kept) == 4,
            )
        print(*(line for line in service.log().splitlines() if "qwen-" in line), sep="\n", flush=True)


def _replica(rig: Rig, role: str, generation: int, number: int) -> Replica:
    address = f"10.77.5.{10 * generation + 2 * number + ROLES.index(role)}"
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    engine = EngineProcess(role, 2, "--dp-attention", *FAST, host=address)
    return Replica(role, address, engine, Pod(rig.cluster, f"qwen-{role}-v{generation}-{number}"))


def _ready_endpoints(rig: Rig, role: str) -> int:
    slices = rig.cluster.request("GET", f"{SLICES}?labelSelector=kubernetes.io%2Fservice-name%3Dqwen-{role}")
    return sum(each["conditions"]["ready"] for item in slices["items"] for each in item["endpoints"] or ())


def _replace(old: Replica, load: SteadyLoad, departures: Departures) -> None:
    """End one engine as a rollout does."""
    departures.left(old.engine)
    old.pod.terminate()
    load.go_on(LATE + 1)
    wait_for(old.is_idle, _PATIENCE)
    departures.keep([old.engine])
    old.engine.stop()
    old.pod.report(old.address, ready=False)
    old.pod.remove()
    load.go_on()


def _failed(load: SteadyLoad) -> int:
    return sum(count for result, count in load.results.items() if result != "ok")


def _fresh(service: ServiceProcess) -> set[str]:
    return {each["url"] for each in service.loads()["endpoints"] if each["state"] == "fresh"}


def _check(rig: Rig, config: dict[str, object]) -> None:
    path = Path(rig.recordings) / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    argv = [sys.executable, "-m", "dp_extproc", "check", "--config", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    found = len(set(re.findall(r"http://10\.77\.5\.\d+", done.stdout)))
    rig.report.add(
        "check", f"exit status {done.returncode}, {found} endpoints", good=done.returncode == 0 and found == 4
    )
    print(done.stdout + done.stderr, flush=True)
