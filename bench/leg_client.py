"""CPU time that a prefill leg costs its sender, by HTTP client, against what the rest of the request costs.

Run:  python -m bench.leg_client [--requests 2000] [--rounds 7]

Each client is a process of its own, on uvloop as the service is, and posts bodies of two buffers to a server in another
process, which answers 300 bytes. The rest of the request is the main stream alone: the service of
:mod:`bench.ext_proc_cost` gets request headers, body and response headers. Clients and service are measured in turns.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp
import grpc.aio
import httpx
import uvloop

from bench.ext_proc_cost import SIZES, Load, started
from dp_extproc.attempt.events import LegClosed, LegEvent, LegHeaders
from dp_extproc.config.reliability import Supervise
from dp_extproc.legs.client import LegClient
from dp_extproc.legs.request import LegRequest

PATH: Final = "/v1/chat/completions"
ANSWER: Final = b'{"id":"1","object":"chat.completion","choices":[],"usage":{}}'.ljust(300)
CONCURRENCY: Final = 8
PREAMBLE: Final = b'{"bootstrap_host":"10.0.0.1","bootstrap_port":8998,"bootstrap_room":1234567890123456789,"rid":"x",'
Send = Callable[[str, bytes, memoryview], Awaitable[int]]


class Engine(asyncio.Protocol):
    """Answers each POST when its body is complete."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._missing = -1
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._received += data
            head, separator, rest = bytes(self._received).partition(b"\r\n\r\n")
            if not separator:
                return
            (length,) = (line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            self._missing = int(length) - len(rest)
            self._received.clear()
        else:
            self._missing -= len(data)
        if self._missing == 0:
            self._missing = -1
            head = b"HTTP/1.1 200 OK\r\ndate: Mon, 30 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
            self._transport.write(head + b"content-length: 300\r\ncontent-type: application/json\r\n\r\n" + ANSWER)


# --- the clients ---


async def _legs() -> Send:
    client = LegClient()

    async def send(address: str, preamble: bytes, tail: memoryview) -> int:
        status = 0
        ended = asyncio.get_running_loop().create_future()

        def take(event: LegEvent) -> None:
            nonlocal status
            if isinstance(event, LegHeaders):
                status = event.status
            elif isinstance(event, LegClosed):
                ended.set_result(None)

        client.send(LegRequest(address, PATH, (("content-type", b"application/json"),), preamble, tail, 60.0), take)
        await ended
        return status

    return send


async def _aiohttp() -> Send:
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
    )

    async def send(address: str, preamble: bytes, tail: memoryview) -> int:
        async with session.post(f"http://{address}{PATH}", data=preamble + tail, allow_redirects=False) as response:
            await response.read()
            return response.status

    return send


async def _httpx() -> Send:
    client = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=None, trust_env=False)  # noqa: S113

    async def send(address: str, preamble: bytes, tail: memoryview) -> int:
        return (await client.post(f"http://{address}{PATH}", content=preamble + tail)).status_code

    return send


async def _streams() -> Send:
    """Make the least that can be done with asyncio's streams: no check of anything."""
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(address: str, preamble: bytes, tail: memoryview) -> int:
        host, _, port = address.rpartition(":")
        reader, writer = idle.pop() if idle else await asyncio.open_connection(host, int(port))
        length = len(preamble) + len(tail)
        writer.writelines((f"POST {PATH} HTTP/1.1\r\ncontent-length: {length}\r\n\r\n".encode() + preamble, tail))
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(300)
        idle.append((reader, writer))
        return int(head[9:12])

    return send


CLIENTS: Final[dict[str, Callable[[], Awaitable[Send]]]] = {
    "legs": _legs,
    "aiohttp": _aiohttp,
    "httpx": _httpx,
    "streams": _streams,
}


async def _serve_engine() -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def _serve_client(name: str, address: str) -> None:
    """Send as many requests of a size as each line of standard input says, and print the CPU time of one."""
    send = await CLIENTS[name]()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        size, count = map(int, line.split())
        tail = memoryview(b"x" * (size - len(PREAMBLE)))

        async def some(requests: int, tail: memoryview = tail) -> None:
            for _ in range(requests):
                assert await send(address, PREAMBLE, tail) == 200

        await asyncio.gather(*(some(2) for _ in range(CONCURRENCY)))
        before = time.process_time()
        await asyncio.gather(*(some(count // CONCURRENCY) for _ in range(CONCURRENCY)))
        print((time.process_time() - before) / (count // CONCURRENCY * CONCURRENCY), flush=True)


# --- the comparison ---


class MainStreams(Load):
    """Sends main streams alone, as a gateway does whose service sends the prefill leg."""

    async def _some(self, call: Any, count: int) -> None:
        for _ in range(count):
            stream = call()
            for message in (*self._messages, self._response):
                await stream.write(message)
                await stream.read()
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF


def _start(running: ExitStack, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.leg_client", *arguments]
    process = running.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    assert process.stdin is not None
    running.callback(process.stdin.close)
    return process


def _ask(process: subprocess.Popen[str], line: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


async def _compare(requests: int, rounds: int) -> list[dict[str, Any]]:
    results = []
    with ExitStack() as running:
        engine = _start(running, "--engine")
        assert engine.stdout is not None
        address = f"127.0.0.1:{int(engine.stdout.readline())}"
        clients = {name: _start(running, "--client", name, "--address", address) for name in CLIENTS}
        service = running.enter_context(started(Supervise.OFF.value))
        for label, size in SIZES.items():
            load = MainStreams(size, CONCURRENCY, Supervise.OFF.value)
            count = max(CONCURRENCY, requests // (10 if size >= 1_000_000 else 1))
            costs: dict[str, list[float]] = {name: [] for name in (*clients, "rest")}
            for index in range(rounds + 1):
                found = {name: _ask(process, f"{size} {count}") for name, process in clients.items()}
                found["rest"] = await load.run(service, count)
                if index:  # the first round warms up
                    for name, cost in found.items():
                        costs[name].append(cost)
            for name in clients:
                parts = [cost / (cost + rest) for cost, rest in zip(costs[name], costs["rest"], strict=True)]
                results.append({
                    "body": label,
                    "client": name,
                    "client_us": statistics.median(costs[name]) * 1e6,
                    "rest_us": statistics.median(costs["rest"]) * 1e6,
                    "part": statistics.median(parts),
                    "parts": [round(part, 3) for part in parts],
                })  # fmt: skip
    return results


def main() -> None:
    """Run the comparison, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="per client and round; a tenth for 1 MB bodies")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        uvloop.run(_serve_engine())
        return
    if args.client:
        uvloop.run(_serve_client(args.client, args.address))
        return
    results = uvloop.run(_compare(args.requests, args.rounds))
    print(f"{'body':>6}  {'client':>8}  {'leg':>9}  {'the rest':>9}  part of the whole request (least to most)")
    for row in results:
        print(
            f"{row['body']:>6}  {row['client']:>8}  {row['client_us']:6.0f} us  {row['rest_us']:6.0f} us  "
            f"{row['part']:6.1%} ({min(row['parts']):.1%} to {max(row['parts']):.1%})"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"cpus": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
