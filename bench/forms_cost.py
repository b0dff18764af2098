"""CPU time of a disaggregated request in the service and in Envoy, by who sends the prefill leg.

Run:  PYTHONPATH=tests python -m bench.forms_cost [--requests 100] [--rounds 5]

One pair of strict engines stands behind four services, each with an Envoy of its own, which get requests in turn:

- ``mirrored``: the bundled Envoy mirrors the prefill leg.
- ``service``: the service sends it, and the bundled Envoy the decode leg.
- ``picker``: the service sends it, and another gateway the decode leg; response bodies do not pass through the service.
- ``duplex``: as ``picker``, but response bodies pass in full duplex.

Requests are chats without a streamed response, one after another. The cost of an idle process is subtracted.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from bench.ext_proc_cost import SIZES
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.gateway import ext_proc, load_gateway
from e2e.stack import FAST

PATH: Final = "/v1/chat/completions"
_PICKER: Final = {"protocol": "endpoint_picker", "picker": {"hold": "10s"}}
FORMS: Final[dict[str, dict[str, Any]]] = {
    "mirrored": {},
    "service": {"prefill_leg": "service"},
    "picker": _PICKER,
    "duplex": _PICKER,
}
"""The keys of the configuration that make a form."""
_LOAD: Final = {"interval": "1s", "stale_after": "60s", "timeout": "10s"}


@dataclass(frozen=True)
class Form:
    """A service with its Envoy."""

    service: ServiceProcess
    envoy: EnvoyProcess
    client: httpx.Client

    def cpu_seconds(self) -> tuple[float, float]:
        """Return the CPU time of the service and of Envoy so far, in nanosecond resolution (Linux schedstat)."""
        return _cpu_seconds(self.service.pid), _cpu_seconds(self.envoy.pid)

    def idle(self, seconds: float) -> tuple[float, float]:
        """Return the CPU time of each process in a second without requests."""
        before, began = self.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        passed = time.monotonic() - began
        service, envoy = self.cpu_seconds()
        return (service - before[0]) / passed, (envoy - before[1]) / passed

    def run(self, body: bytes, requests: int, idle: tuple[float, float]) -> tuple[float, float]:
        """Send requests, and return the CPU time of one in each process."""
        before, began = self.cpu_seconds(), time.monotonic()
        for _ in range(requests):
            self.client.post(PATH, content=body, headers={"content-type": "application/json"}).raise_for_status()
        passed = time.monotonic() - began
        service, envoy = self.cpu_seconds()
        return (
            (service - before[0] - passed * idle[0]) / requests,
            (envoy - before[1] - passed * idle[1]) / requests,
        )


def _cpu_seconds(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def _body(size: int) -> bytes:
    """Make a chat of so many bytes. Images are not counted in tokens, so any size fits into the context."""
    text = {"type": "text", "text": "hello"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    chat = {"model": "m", "messages": [{"role": "user", "content": [text, image]}], "max_tokens": 4}
    image["image_url"]["url"] += "A" * (size - len(json.dumps(chat)))  # type: ignore[index]
    return json.dumps(chat).encode()


def _gateway(service: ServiceProcess, decode: EngineProcess, form: str) -> str | None:
    if form not in {"picker", "duplex"}:
        return None
    gateway = load_gateway(service.config, [decode.port], "endpoint-picker-pd.yaml")
    if form == "duplex":
        ext_proc(gateway)["processing_mode"]["response_body_mode"] = "FULL_DUPLEX_STREAMED"
    return yaml.safe_dump(gateway)


def _start(running: ExitStack, prefill: EngineProcess, decode: EngineProcess, form: str) -> Form:
    pool = {"models": ["*"], "prefill": {"endpoints": [prefill.url]}, "decode": {"endpoints": [decode.url]}}
    service = running.enter_context(ServiceProcess(write_config([pool], load=_LOAD, **FORMS[form])))
    envoy = running.enter_context(EnvoyProcess(service.config, bootstrap=_gateway(service, decode, form)))
    client = running.enter_context(loopback.client(envoy.url, timeout=120))
    service.wait_until_fresh()
    service.wait_until_ready()
    return Form(service, envoy, client)


def compare(requests: int, rounds: int, sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Measure each form with each size."""
    results = []
    with ExitStack() as running:
        flags = ("--dp-attention", *FAST)
        prefill, decode = (running.enter_context(EngineProcess(role, 2, *flags)) for role in ("prefill", "decode"))
        forms = {name: _start(running, prefill, decode, name) for name in FORMS}
        for label in sizes:
            body = _body(SIZES[label])
            count = max(5, requests // (5 if SIZES[label] >= 1_000_000 else 1))
            costs: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
            for index in range(rounds + 1):
                idle = {name: form.idle(1.0) for name, form in forms.items()}
                for name in forms if index % 2 else reversed(forms):
                    cost = forms[name].run(body, count, idle[name])
                    if index:  # the first round warms up
                        costs[name].append(cost)
            for name, each in costs.items():
                ratios = [sum(mine) / sum(base) for mine, base in zip(each, costs["mirrored"], strict=True)]
                results.append({
                    "body": label,
                    "form": name,
                    "service_ms": statistics.median(service for service, _ in each) * 1e3,
                    "envoy_ms": statistics.median(envoy for _, envoy in each) * 1e3,
                    "ratio": statistics.median(ratios),
                    "ratios": [round(ratio, 3) for ratio in ratios],
                })  # fmt: skip
    return results


def main() -> None:
    """Run the comparison, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100, help="per form and round; a fifth for 1 MB bodies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = compare(args.requests, args.rounds, args.sizes)
    print(f"{'body':>6}  {'form':>8}  {'service':>8}  {'Envoy':>8}  both to mirrored (median of {args.rounds}, range)")
    for row in results:
        print(
            f"{row['body']:>6}  {row['form']:>8}  {row['service_ms']:5.2f} ms  {row['envoy_ms']:5.2f} ms  "
            f"{row['ratio']:.2f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"cpus": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
