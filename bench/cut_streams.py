"""Measure the hop that ends truncated streams with an error event: Envoy's CPU time for each event of a stream.

The same strict engine runs behind two Envoys, which get requests in turn. With ``truncated_streams: reset`` responses
come directly from the engine, and with ``error_event`` through the hop. Only the ratio within a round counts.

    python bench/cut_streams.py [--requests 20] [--rounds 7]
"""

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx

from dp_extproc.config import TruncatedStreams
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config

TOKENS: Final = 400
AT_A_TIME: Final = 10
BODY: Final = {"prompt": "hello", "max_tokens": TOKENS, "stream": True}
_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")


def _stream(client: httpx.Client) -> int:
    """Read a stream to its end, and count its events."""
    with client.stream("POST", "/v1/completions", json=BODY) as response:
        response.raise_for_status()
        return sum(line.startswith("data:") for line in response.iter_lines())


def _seconds(envoy: EnvoyProcess) -> float:
    """Return the CPU time of an Envoy: utime and stime, fields 14 and 15 of ``proc_pid_stat(5)``."""
    fields = Path(f"/proc/{envoy.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK


def main() -> None:
    """Run the comparison, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20, help="per round and form")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with ExitStack() as running:
        engine = running.enter_context(EngineProcess("unified", 2, "--dp-attention", "--time-scale", "0.1"))
        pool = {"models": ["*"], "workers": {"endpoints": [engine.url]}}
        forms: dict[TruncatedStreams, tuple[EnvoyProcess, httpx.Client]] = {}
        for form in TruncatedStreams:
            settings = write_config([pool], envoy={"truncated_streams": form.value})
            service = running.enter_context(ServiceProcess(settings))
            service.wait_until_fresh()
            envoy = running.enter_context(EnvoyProcess(service.config))
            client = running.enter_context(loopback.client(envoy.url, timeout=60))
            forms[form] = envoy, client
        threads = running.enter_context(ThreadPoolExecutor(AT_A_TIME))
        costs: dict[TruncatedStreams, list[float]] = {form: [] for form in TruncatedStreams}
        for index in range(args.rounds + 1):
            for form, (envoy, client) in forms.items():
                before = _seconds(envoy)
                events = sum(threads.map(_stream, [client] * args.requests))
                if index:  # the first round warms up
                    costs[form].append(1e6 * (_seconds(envoy) - before) / events)
        ratios = [
            event / cut
            for cut, event in zip(costs[TruncatedStreams.RESET], costs[TruncatedStreams.ERROR_EVENT], strict=True)
        ]
        cut, event = (statistics.median(costs[form]) for form in TruncatedStreams)
        print(f"Envoy's processor time per event: {cut:.1f} us straight, {event:.1f} us through the hop")
        print(
            f"ratio {statistics.median(ratios):.2f} (median of {args.rounds}; {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
