"""Measure the service with 256 endpoints from each source: longest stall while they appear, then CPU and memory.

The components of the service run in a process of their own, with two endpoints at first. Then the source names 256 at
once. One small HTTP server stands in for all engines; it, and the servers of DNS and Kubernetes, are other processes.

A stall is the CPU time of the event loop between two beats of a task that sleeps for a millisecond. Wall-clock time is
printed beside it; it contains what other programs took on a busy machine.

    PYTHONPATH=tests python bench/many_endpoints.py [--endpoints 256] [--seconds 10] [static file dns kubernetes]
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import uvloop
import yaml
from grpc_health.v1.health import aio

from dp_extproc.background import Guard
from dp_extproc.config import parse_config
from dp_extproc.engines.model import Endpoint, LoadPage
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.load.cache import LoadCache
from dp_extproc.runtime.components import Components
from dp_extproc.runtime.garbage import tune_collections

SOURCES: Final = ("static", "file", "dns", "kubernetes")
RANKS: Final = 8
"""DP ranks of each engine."""
BEAT: Final = 0.001
_POLL: Final = 0.02
_PATIENCE: Final = 60.0


def addresses(count: int, first: int) -> list[str]:
    """Return addresses of the loopback interface, on all of which one server listens."""
    return [f"127.{first}.{number // 250}.{number % 250 + 1}" for number in range(count)]


# --- the engines ---


async def serve_engines(ports: Mapping[str, int]) -> None:
    """Answer as prefill engines on one port and as decode engines on another, at all addresses."""
    loads = [{"dp_rank": rank, "num_used_tokens": 1000 * rank, "num_running_reqs": rank} for rank in range(RANKS)]
    page = {"loads": loads}

    def respond(mode: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
        info = {"version": "0.5.23", "dp_size": 1, "attn_dp_size": RANKS, "enable_dp_attention": True}
        info |= {"disaggregation_mode": mode, "page_size": 1, "kv_cache_dtype": "auto", "enable_metrics": False}
        info |= {f"option_{number}": "some value" for number in range(200)}  # real pages have as many options
        bodies = {"/server_info": json.dumps(info), "/v1/loads": json.dumps(page), "/ready": ""}
        answers = {path: _http(200, body) for path, body in bodies.items()}

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(answers.get(head.split(b" ", 2)[1].decode(), _http(404, "{}")))
            writer.close()

        return connected

    servers = [await asyncio.start_server(respond(mode), "0.0.0.0", port) for mode, port in ports.items()]
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await asyncio.gather(*(server.serve_forever() for server in servers))


def _http(status: int, body: str) -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


# --- the process that is measured ---


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def count_sampled() -> set[str]:
    """Return a set to which every endpoint is added whose load is read. /loads would cost more than is measured."""
    urls: set[str] = set()
    note = LoadCache.sampled

    def sampled(cache: LoadCache, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        urls.add(endpoint.url)
        note(cache, endpoint, page, started, now)

    setattr(LoadCache, "sampled", sampled)  # noqa: B010 - a method is no variable to mypy
    return urls


class Beats:
    """The longest time between two beats of the event loop, in seconds."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    async def run(self) -> None:
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(BEAT)
            self.wall = max(self.wall, time.perf_counter() - wall - BEAT)
            self.cpu = max(self.cpu, time.thread_time() - cpu)

    def take(self) -> dict[str, float]:
        found = {"stall_ms": 1000 * self.cpu, "wall_ms": 1000 * self.wall}
        self.cpu = self.wall = 0.0
        return found


async def measure(path: Path, endpoints: int, seconds: float) -> None:
    """Run the components; print a line when the first endpoints are there, and the results at the end."""
    config = await asyncio.to_thread(lambda: parse_config(path.read_text()))
    parts = Components(
        config, aio.HealthServicer(), owner="127.0.0.1:1", clock=time.monotonic, rng=random.Random(1), guard=Guard()
    )
    tune_collections()
    beats, sampled = Beats(), count_sampled()
    loop = asyncio.get_running_loop()

    async def seen(count: int) -> None:
        async with asyncio.timeout(_PATIENCE):
            while len(sampled) < count:  # noqa: ASYNC110 - it is only measured
                await asyncio.sleep(_POLL)

    tasks = [asyncio.ensure_future(work()) for work in parts.tasks().values()]
    await seen(2)
    sys.stdout.write("go\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.readline)
    before = await loop.run_in_executor(None, path.read_text)
    changed = await loop.run_in_executor(None, parse_config, before)
    tasks.append(asyncio.ensure_future(beats.run()))
    began = time.perf_counter()
    if changed != config:
        parts.apply(changed)
    await seen(endpoints)
    joined = time.perf_counter() - began
    joining = beats.take()
    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds)
    share = (time.process_time() - cpu) / (time.perf_counter() - began)
    steady = beats.take()
    result = {"joined": joined, "joining": joining, "cpu": share, "steady": steady, "rss": resident_bytes()}
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- the sources ---


@contextmanager
def source(kind: str, ports: Mapping[str, int], folder: Path) -> Iterator[tuple[dict[str, Any], Callable[[int], None]]]:
    """Give the pool of a configuration, and a function that changes how many endpoints its source names."""
    if kind == "static":
        yield from _static(ports, folder)
    elif kind == "file":
        yield from _file(ports, folder)
    elif kind == "dns":
        yield from _dns(ports)
    else:
        yield from _kubernetes(ports)


def _urls(role: str, ports: Mapping[str, int], count: int) -> list[str]:
    return [f"http://{address}:{ports[role]}" for address in addresses(count, 1 if role == "prefill" else 2)]


def _static(ports: Mapping[str, int], folder: Path) -> Iterator[tuple[dict[str, Any], Callable[[int], None]]]:
    def pool(count: int) -> dict[str, Any]:
        return {"models": ["*"], **{role: {"endpoints": _urls(role, ports, count)} for role in ports}}

    yield pool(1), lambda count: _write(folder / "config.yaml", configuration(pool(count)))


def _file(ports: Mapping[str, int], folder: Path) -> Iterator[tuple[dict[str, Any], Callable[[int], None]]]:
    def change(count: int) -> None:
        for role in ports:
            _write(folder / role, _urls(role, ports, count))

    change(1)
    yield {"models": ["*"], **{role: {"file": {"path": str(folder / role)}} for role in ports}}, change


def _dns(ports: Mapping[str, int]) -> Iterator[tuple[dict[str, Any], Callable[[int], None]]]:
    from fleet.discovery.dns_server import dns_server  # noqa: PLC0415 - of the tests

    with dns_server() as server:

        def change(count: int) -> None:
            for role in ports:
                server.set(f"{role}.test", "A", *addresses(count, 1 if role == "prefill" else 2))

        change(1)
        of_all = {"nameserver": f"127.0.0.1:{server.port}", "interval": "1s"}
        names = {role: {"dns": {"name": f"{role}.test", "port": port, **of_all}} for role, port in ports.items()}
        yield {"models": ["*"], **names}, change


def _kubernetes(ports: Mapping[str, int]) -> Iterator[tuple[dict[str, Any], Callable[[int], None]]]:
    import kube_api  # noqa: PLC0415 - of the tests

    with kube_api.FakeApiServer() as api, tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:

        def change(count: int) -> None:
            for role, port in ports.items():
                found = addresses(count, 1 if role == "prefill" else 2)
                for start in range(0, count, 100):  # a slice has 100 endpoints at most
                    piece = kube_api.endpoint_slice(f"{role}-{start}", role, *found[start : start + 100], port=port)
                    api.put(kube_api.SLICES, piece)

        change(1)
        cluster = {"name": "c", "cluster": {"server": api.url}}
        user = {"name": "u", "user": {"token": kube_api.TOKEN}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}
        kinds = {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "x"}
        yaml.safe_dump(kinds, file)
        file.flush()
        os.environ["KUBECONFIG"] = file.name
        yield {"models": ["*"], **{role: {"kubernetes": {"service": role}} for role in ports}}, change


def configuration(pool: dict[str, Any]) -> dict[str, Any]:
    return {"listen": {"grpc": "127.0.0.1:1", "admin": "127.0.0.1:2"}, "pools": [pool]}


def _write(path: Path, content: object) -> None:
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump(content), encoding="utf-8")
    new.replace(path)


def run(kind: str, ports: Mapping[str, int], endpoints: int, seconds: float) -> None:
    """Measure one source, and print a line of the table."""
    with tempfile.TemporaryDirectory() as name, source(kind, ports, Path(name)) as (pool, change):
        path = Path(name) / "config.yaml"
        _write(path, configuration(pool))
        arguments = ["--measure", str(path), "--endpoints", str(endpoints), "--seconds", str(seconds)]
        child = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "go\n"
            if kind == "static":
                change(endpoints // 2)
            child.stdin.write("\n")
            child.stdin.flush()
            if kind != "static":
                change(endpoints // 2)
            found = json.loads(child.stdout.readline())
    stall, steady = found["joining"], found["steady"]
    memory = found["rss"] / (1 << 20)
    print(
        f"{kind:10}  {found['joined']:6.2f} s  {stall['stall_ms']:6.1f} ms ({stall['wall_ms']:6.1f})  "
        f"{steady['stall_ms']:6.1f} ms ({steady['wall_ms']:6.1f})  {found['cpu']:6.1%}  {memory:6.0f} MiB",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=SOURCES)
    parser.add_argument("--endpoints", type=int, default=256, help="half prefill, half decode")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the steady state")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        uvloop.run(serve_engines(dict(zip(("prefill", "decode"), args.serve, strict=True))))
    elif args.measure:
        uvloop.run(measure(args.measure, args.endpoints, args.seconds))
    else:
        ports = {"prefill": free_port(), "decode": free_port()}
        options = ["--serve", *map(str, ports.values())]
        engines = subprocess.Popen([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True)
        try:
            assert engines.stdout is not None
            assert engines.stdout.readline() == "listening\n"
            print("source      joined    longest stall (wall)   steady: stall (wall)     CPU     memory", flush=True)
            for kind in args.sources:
                run(kind, ports, args.endpoints, args.seconds)
        finally:
            engines.kill()
            engines.wait()


if __name__ == "__main__":
    main()
