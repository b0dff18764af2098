"""Measure what the commit gate costs a client: time to first token with supervision and without.

The same strict engines (one prefill, one decode engine) run behind two services with an Envoy each, which get requests
in turn. The engines' own times are in both results. So the difference is the cost of supervision: its messages, and the
gap for which a response is held until prefill has answered.

    python bench/commit_gate.py [--requests 200] [--rounds 5]
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from typing import Final

import httpx

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config

MODES: Final = ("off", "legs", "first_event")
BODIES: Final = {
    "/generate": {"text": "hello " * 200, "sampling_params": {"max_new_tokens": 4}, "stream": True},
    "/v1/chat/completions": {
        "model": "m",
        "messages": [{"role": "user", "content": "hello " * 200}],
        "max_tokens": 4,
        "stream": True,
    },
}


def _first_token(client: httpx.Client, path: str) -> float:
    """Return the seconds until the first event that is more than a head."""
    began = time.perf_counter()
    with client.stream("POST", path, json=BODIES[path]) as response:
        response.raise_for_status()
        for chunk in response.iter_raw():
            if chunk:
                return time.perf_counter() - began
    raise RuntimeError(f"{path} gave no token")


def main() -> None:
    """Run the comparison, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40, help="per round, path and mode")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with ExitStack() as running:
        flags = ("--dp-attention", "--time-scale", "0.2")
        engines = [running.enter_context(EngineProcess(role, 2, *flags)) for role in ("prefill", "decode")]
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [engines[0].url]},
            "decode": {"endpoints": [engines[1].url]},
        }
        clients = {}
        for mode in MODES:
            service = running.enter_context(ServiceProcess(write_config([pool], supervision={"mode": mode})))
            service.wait_until_fresh()
            envoy = running.enter_context(EnvoyProcess(service.config))
            clients[mode] = running.enter_context(loopback.client(envoy.url, timeout=60))
        print(f"{'path':>22}  {'':>11}  {'TTFT':>9}  more than off, ms (median of rounds; least to most)")
        for path in BODIES:
            medians: dict[str, list[float]] = {mode: [] for mode in MODES}
            for index in range(args.rounds + 1):
                times: dict[str, list[float]] = {mode: [] for mode in MODES}
                for _ in range(args.requests):
                    for mode, client in clients.items():
                        times[mode].append(1000 * _first_token(client, path))
                if index:  # the first round warms up
                    for mode in MODES:
                        medians[mode].append(statistics.median(times[mode]))
            for mode in MODES:
                more = [mine - off for mine, off in zip(medians[mode], medians["off"], strict=True)]
                spread = f"{statistics.median(more):+.2f}  ({min(more):+.2f} to {max(more):+.2f})"
                print(f"{path:>22}  {mode:>11}  {statistics.median(medians[mode]):6.2f} ms  {spread}")


if __name__ == "__main__":
    main()
