"""The containers of the topology sidecar serve a request and stop in order, as processes of this machine."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
import yaml

from deploy.chart import MANIFESTS, containers, only, parse, service_configuration
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import find_envoy
from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.tied_process import start_tied
from patience import wait_for

SERVICE = [sys.executable, "-m", "dp_extproc"]
"""What is the entry point of the image."""
REQUEST = {"model": "any", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@dataclass
class Pod:
    """Processes of one pod, and the addresses of its containers."""

    url: str
    admin_url: str
    envoy_admin_url: str
    stop_envoy: list[str]
    """Command that Kubernetes runs in Envoy's container before it stops Envoy."""


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """Start the containers of the manifest in their order, with addresses, paths and endpoints of this machine."""
    objects = parse((MANIFESTS / "sidecar.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load(service_configuration(objects))
    spec = only(objects, "Deployment")["spec"]["template"]["spec"]
    init, service, envoy = containers(spec)
    grpc, admin, inference, envoy_admin = (f"127.0.0.1:{port}" for port in free_ports(4))
    folder = tmp_path_factory.mktemp("pod")
    with ExitStack() as running:
        prefill, decode = (running.enter_context(EngineProcess(role, 2)) for role in ("prefill", "decode"))
        pools = [{"models": ["*"], "prefill": {"endpoints": [prefill.url]}, "decode": {"endpoints": [decode.url]}}]
        config["listen"] |= {"grpc": grpc, "admin": admin}
        config["envoy"] |= {"inference": inference, "admin": envoy_admin}
        (folder / "dp-extproc.yaml").write_text(yaml.safe_dump({**config, "pools": pools}), encoding="utf-8")

        def here(words: list[str]) -> list[str]:
            """Name files by their places on this machine."""
            found = [each.replace("/etc/dp-extproc-envoy", str(folder)) for each in words]
            return [each.replace("/etc/dp-extproc", str(folder)) for each in found]

        shell, option, script = here(init["command"])
        subprocess.run(
            [shell, option, script.replace("dp-extproc envoy-config", " ".join([*SERVICE, "envoy-config"]))], check=True
        )
        for command in ([*SERVICE, *here(service["args"])], [find_envoy(), *here(envoy["command"])[1:]]):
            with (folder / "log").open("ab") as log:
                process = start_tied(command, log, log)
            running.callback(process.wait)
            running.callback(process.terminate)
        stop = envoy["lifecycle"]["preStop"]["exec"]["command"]
        found = Pod(
            f"http://{inference}",
            f"http://{admin}",
            f"http://{envoy_admin}",
            [*stop[:-3], envoy_admin.rpartition(":")[2], "0", stop[-1]],
        )
        for url in (f"{found.admin_url}/readyz", f"{found.envoy_admin_url}/ready"):
            wait_for(partial(_is, 200, url), 30)
        yield found


def _is(status: int, url: str) -> bool:
    try:
        return loopback.CLIENT.get(url).status_code == status
    except httpx.TransportError:
        return False


def test_pod_serves_a_request(pod: Pod) -> None:
    """Envoy uses the configuration that the first container printed, and reaches the service on loopback."""
    response = loopback.CLIENT.post(f"{pod.url}/v1/chat/completions", json=REQUEST)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"]
    samples = loopback.CLIENT.get(f"{pod.admin_url}/metrics").text
    assert "dp_extproc_missing_prefill_legs_total 0" in samples


def test_envoy_is_stopped_when_no_request_is_in_flight(pod: Pod) -> None:
    """The command before the stop waits for streams; until then Envoy answers, and sends clients to other pods."""
    body: dict[str, Any] = {**REQUEST, "stream": True, "max_tokens": 20_000}
    with loopback.CLIENT.stream("POST", f"{pod.url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()  # without a reference the response would be closed
        next(lines)
        stopping = subprocess.Popen(pod.stop_envoy)
        try:
            wait_for(partial(_is, 503, f"{pod.envoy_admin_url}/ready"))
            other = loopback.CLIENT.post(f"{pod.url}/v1/chat/completions", json=REQUEST)
            assert (other.status_code, other.headers["connection"]) == (200, "close")
            assert stopping.poll() is None
            response.close()
            assert stopping.wait(30) == 0
        finally:
            stopping.kill()
            stopping.wait()
