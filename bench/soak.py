"""Load a fleet for a long time while engines and worker processes are killed at random: nothing may be lost or left.

``python -m bench.soak --seconds 3600``. Prints a line every ten seconds, and a summary at the end. It ends with status
1 if the memory of the service has grown, reservations are left, or a request was lost that could have been served. One
engine or one worker process is down at a time, so every request without a token could have been served.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final

import aiohttp

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config

_PATIENCE: Final = ("--timeout-bootstrap", "100000", "--timeout-waiting", "100000", "--timeout-heartbeat", "1000")
"""Options by which engines never give up by themselves: whatever hangs, hangs until the router ends it."""
_GRACE: Final = 60.0
"""Seconds that a client waits for the next byte."""
_DOWN: Final = (1.0, 8.0)
"""Seconds between the death of an engine and its restart, at least and at most."""
_AT_PEACE: Final = 5.0
"""Least seconds between a restart and the next death: Envoy checks worker processes once a second."""
_REPORT: Final = 10.0
_WARM_UP: Final = 0.25
"""Fraction of the time in which memory may grow."""
_GROWTH: Final = 1.10
_GROWTH_BYTES: Final = 16 << 20
"""Bytes of growth from the second to the last quarter, by both measures, from which on memory counts as grown."""
_SHOWN: Final = 20
"""Number of lost requests to print, with the access log of each of their legs."""
_TELLING: Final = (
    *("time", "leg", "status", "response_flags", "response_code_details", "reason", "duration_ms"),
    *("prefill_host", "decode_host"),
)
_MOST_OPEN: Final = 2000

_PATHS: Final[dict[str, Any]] = {
    "/v1/chat/completions": lambda text, tokens: {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
    },
    "/generate": lambda text, tokens: {"text": text, "sampling_params": {"max_new_tokens": tokens}},
}


@dataclass
class Soak:
    """The state of a run."""

    args: argparse.Namespace
    prefills: Sequence[EngineProcess]
    decodes: Sequence[EngineProcess]
    service: ServiceProcess
    envoy: EnvoyProcess
    rng: Random
    ends: Counter[str] = field(default_factory=Counter)
    """Number of requests by result."""
    lost: dict[str, str] = field(default_factory=dict)
    """Number of wrong results, by request id."""
    kills: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Time, and bytes of the largest process that schedules requests."""
    dying: bool = False
    """Whether an answering engine is being killed at this moment."""
    asked: int = 0
    open: int = 0
    trouble: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while something is down, because a leg waits if its engine and its supervising process die together."""
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Run load and failures for the requested time."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=_GRACE)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(self.envoy.url, connector=connector, timeout=timeout) as session,
            asyncio.TaskGroup() as tasks,
        ):
            others = [tasks.create_task(each) for each in (self._report(), self._kill_engines(), self._kill_workers())]
            at = time.monotonic()
            deadline = at + self.args.seconds
            while (at := at + self.rng.expovariate(self.args.rate)) < deadline:
                await asyncio.sleep(at - time.monotonic())  # make up for late requests
                if self.open < _MOST_OPEN:
                    tasks.create_task(self._ask(session))
            self.over.set()
            for each in others:
                await each

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        path = self.rng.choice(list(_PATHS))
        stream = self.rng.random() < 0.5
        text = "word " * int(self.rng.lognormvariate(4, 1))
        body = {**_PATHS[path](text, self.rng.randint(1, self.args.tokens)), "stream": stream}
        leaves = self.rng.random() < self.args.leave
        self.asked += 1
        request_id = f"soak-{self.asked}"
        self.open += 1
        deaths = self.kills["decode"] - self.dying
        try:
            end = await _outcome(session, path, body, request_id, leaves=leaves)
        finally:
            self.open -= 1
        self.ends[end] += 1
        # Only the death of an engine may truncate a response: not that of a worker process, nor of the other role.
        if end not in _FINE and not (end == _CUT and self.kills["decode"] > deaths):
            self.lost[request_id] = end

    async def _kill_engines(self) -> None:
        while not self.over.is_set():
            await self._pause(_AT_PEACE + self.rng.expovariate(1 / self.args.kill_every))
            if self.over.is_set():
                return
            async with self.trouble:
                role = self.rng.choice(("prefill", "decode"))
                victim = self.rng.choice(self.prefills if role == "prefill" else self.decodes)
                self.dying = role == "decode"
                self.note_kill(role, victim.url)
                await asyncio.to_thread(victim.stop, signal.SIGKILL)
                self.dying = False
                await asyncio.sleep(self.rng.uniform(*_DOWN))
                await asyncio.to_thread(victim.start)
                await asyncio.to_thread(victim.wait_until_listening)

    async def _kill_workers(self) -> None:
        if self.args.workers < 2:  # otherwise no process would be left to schedule requests
            return
        while not self.over.is_set():
            await self._pause(_AT_PEACE + self.rng.expovariate(1 / self.args.kill_every))
            async with self.trouble:
                ready = [worker["pid"] for worker in await self._workers() if worker["ready"]]
                if not self.over.is_set() and len(ready) == self.args.workers:
                    pid = self.rng.choice(ready)
                    self.note_kill("worker", str(pid))
                    os.kill(pid, signal.SIGKILL)
                    await self._pause(_DOWN[0])

    def note_kill(self, kind: str, which: str) -> None:
        """Record which process is about to die."""
        self.kills[kind] += 1
        print(f"{datetime.now(UTC):%H:%M:%S.%f}: {kind} {which} dies", flush=True)

    async def _workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await asyncio.to_thread(self.service.loads)).get("worker_processes", [])
        return found

    async def _report(self) -> None:
        began = time.monotonic()
        while not self.over.is_set():
            await self._pause(_REPORT)
            pids = [worker["pid"] for worker in await self._workers()] or [self.service.pid]
            bytes_ = max(map(_resident, pids))
            now = time.monotonic() - began
            self.memory.append((now, bytes_))
            kills = ", ".join(f"{count} {kind}s" for kind, count in self.kills.items())
            print(
                f"{now:6.0f} s: {self.ends.total()} requests over, {self.open} open, {bytes_ >> 20} MiB; "
                f"killed {kills or 'none'}; {_described(self.ends)}",
                flush=True,
            )

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), seconds)


async def _outcome(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any], request_id: str, *, leaves: bool
) -> str:
    text = b""
    status = 0
    try:
        async with session.post(path, json=body, headers={"x-request-id": request_id}) as answer:
            status = answer.status
            async for chunk in answer.content.iter_any():
                text += chunk
                if leaves:
                    return "left"
            if status != 200:
                return f"{status} {answer.headers.get('x-dp-extproc-reason') or _code(text)}"
    except TimeoutError:
        return "nothing came any more" if text else "nothing came"
    except aiohttp.ClientError as error:
        return _CUT if status == 200 and text else f"{type(error).__name__} before a token"
    if text.endswith(b"\n\n") and b'"stream_cut"' in text.rpartition(b"event: error\n")[2]:
        return _CUT
    whole = text.endswith(b"data: [DONE]\n\n") if body["stream"] else text.endswith(b"}")
    return "answered" if whole and b'"length"' in text else "answered in part, as if it were whole"


def _code(text: bytes) -> str:
    try:
        return str(json.loads(text)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return text[:200].decode(errors="replace")


_FINE: Final = frozenset({"answered", "left"})
_CUT: Final = "cut after the first token"


def _described(ends: Counter[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in ends.most_common())


def _resident(pid: int) -> int:
    """Read how much memory a process has; nothing once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), "VmRSS: 0 kB")
    return int(line.split()[1]) << 10


def _has_grown(memory: Sequence[tuple[float, int]], seconds: float) -> tuple[float, float, bool]:
    """Compare the second quarter of the time with the last."""

    def median(begin: float, end: float) -> float:
        found = [size for at, size in memory if begin * seconds <= at <= end * seconds + _REPORT]
        return statistics.median(found) if found else 0.0

    early, late = median(_WARM_UP, 0.5), median(0.75, 1.0)
    return early, late, late > early * _GROWTH and late > early + _GROWTH_BYTES


def _reserved(service: ServiceProcess) -> float:
    """Sum the reservations, after a time in which they can end."""
    deadline = time.monotonic() + 30
    while True:
        endpoints = service.loads()["endpoints"]
        left = sum(float(rank["reserved"]["requests"]) for each in endpoints for rank in each["ranks"])
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


def _summarise(soak: Soak) -> int:
    early, late, has_grown = _has_grown(soak.memory, soak.args.seconds)
    left = _reserved(soak.service)
    print(f"requests: {soak.ends.total()}: {_described(soak.ends)}")
    print(f"killed: {dict(soak.kills)}")
    print(f"memory: {early / (1 << 20):.1f} MiB, later {late / (1 << 20):.1f} MiB{': it has grown' * has_grown}")
    print(f"reservations left: {left:g}")
    print(f"lost: {len(soak.lost)}")
    legs = [line for line in soak.envoy.access_log() if line["request_id"] in soak.lost]
    for request_id, end in islice(soak.lost.items(), _SHOWN):
        print(f"{request_id}: {end}")
        for line in legs:
            if line["request_id"] == request_id:
                print("   ", {name: line[name] for name in _TELLING if line.get(name) is not None})
    return 1 if has_grown or left or soak.lost else 0


def main() -> int:
    """Run the soak test."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--workers", type=int, default=2, help="processes of the service; one alone is not killed")
    parser.add_argument("--engines", type=int, default=2, help="of each role")
    parser.add_argument("--kill-every", type=float, default=15.0, metavar="SECONDS", help="on average")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer at most")
    parser.add_argument("--leave", type=float, default=0.02, metavar="SHARE", help="of clients that do not read on")
    parser.add_argument("--time-scale", default="0.5", help="of the engines: 1 is about as slow as a real one")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    options = ("--dp-attention", "--time-scale", args.time_scale, *_PATIENCE)
    with ExitStack() as running:
        engines = [EngineProcess(role, 2, *options) for role in ("prefill", "decode") for _ in range(args.engines)]
        for engine in engines:
            running.push(engine)
            engine.start()
        for engine in engines:
            engine.wait_until_listening()
        prefills, decodes = engines[: args.engines], engines[args.engines :]
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [engine.url for engine in prefills]},
            "decode": {"endpoints": [engine.url for engine in decodes]},
        }
        load = {"interval": "1s", "stale_after": "5s"}
        config = write_config([pool], load=load, listen={"workers": args.workers} if args.workers > 1 else {})
        service = running.enter_context(ServiceProcess(config))
        envoy = running.enter_context(EnvoyProcess(service.config, concurrency=2))
        service.wait_until_fresh()
        service.wait_until_ready()
        soak = Soak(args, prefills, decodes, service, envoy, Random(args.seed))
        asyncio.run(soak.run())
        return _summarise(soak)


if __name__ == "__main__":
    sys.exit(main())
