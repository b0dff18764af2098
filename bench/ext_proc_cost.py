"""Measure what a request costs in the service, against an empty ext_proc server with the same processes.

All of them are grpc.aio servers on uvloop in a process of their own. The empty one answers each message with a
constant. With ``supervision: off`` a request has one stream with request headers, buffered body and response headers,
and one stream of the prefill leg with its response headers. The messages of supervision measure what it adds: ``legs``
also has the prefill leg's request headers, and ``first_event`` a third stream with the first piece of the response.

The benchmark measures the CPU time of the server process, which hardly depends on other load of the machine. Rounds are
interleaved, and only ratios within a round count: to the empty server with the messages of ``off``, and with the same
messages.

    python bench/ext_proc_cost.py [--requests 400] [--rounds 7] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc.aio
import uvloop
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

from dp_extproc import contract
from dp_extproc.config import PoolConfig, Supervise, SupervisionSettings
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Mode, RankSample, Role, Version
from dp_extproc.extproc.service import SERVICE_NAME, ExtProcService
from dp_extproc.load.cache import LoadCache
from dp_extproc.observability.metrics import Telemetry
from dp_extproc.scheduling.encoder import LegSettings
from dp_extproc.scheduling.scheduler import Scheduler

EMPTY: Final = "empty"
KINDS: Final = (EMPTY, *(mode.value for mode in Supervise))
METHOD: Final = f"/{SERVICE_NAME}/Process"
SIZES: Final = {"1 kB": 1_000, "64 kB": 64_000, "1 MB": 1_000_000}
RANKS: Final = 4
PREFILLS: Final = ("http://127.0.0.1:31001", "http://127.0.0.1:31002")
DECODES: Final = ("http://127.0.0.1:32001", "http://127.0.0.1:32002")
MAX_BODY: Final = 64 << 20
OPTIONS: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


# --- the two servers ---


class _EmptyServer:
    """The ext_proc server that answers every message with a constant."""

    def __init__(self) -> None:
        self._answers: dict[str, bytes] = {}
        for phase in ("request_headers", "request_body", "response_headers", "response_body"):
            response = ProcessingResponse()
            getattr(response, phase).SetInParent()
            self._answers[phase] = response.SerializeToString()

    async def process(self, _requests: object, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("request")
            await context.write(self._answers[kind])
            if kind == "response_body":
                return  # the stream that carries a first event ends with it

    def handler(self) -> Any:
        process = grpc.stream_stream_rpc_method_handler(self.process, ProcessingRequest.FromString, None)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process})


def _service(supervise: Supervise) -> ExtProcService:
    """Make the real service, with a fleet that has been discovered and sampled."""
    endpoints = [
        Endpoint(url, "127.0.0.1", int(url.rpartition(":")[2]), "*", role)
        for role, urls in ((Role.PREFILL, PREFILLS), (Role.DECODE, DECODES))
        for url in urls
    ]
    clock = time.monotonic
    fleet = LoadCache(endpoints, stale_after=1e9)
    for endpoint in endpoints:
        mode = Mode.PREFILL if endpoint.role is Role.PREFILL else Mode.DECODE
        facts = EngineFacts(
            version=Version(0, 5, 23),
            dp_ranks=RANKS,
            mode=mode,
            dp_attention=True,
            served_model="model",
            bootstrap_port=8998,
            load_balance_method=None,
            follows_rooms=mode is Mode.PREFILL,
        )
        fleet.discovered(endpoint, f"127.0.0.1:{endpoint.port}", facts, clock())
        ranks = tuple(RankSample(rank, used_tokens=1000 * rank, age=0.0) for rank in range(RANKS))
        fleet.sampled(endpoint, LoadPage(ranks), clock(), clock())
    pool = PoolConfig.model_validate(
        {"models": ["*"], "prefill": {"endpoints": list(PREFILLS)}, "decode": {"endpoints": list(DECODES)}}
    )
    scheduler = Scheduler(
        [pool],
        fleet,
        owner="127.0.0.1:9002",
        rng=random.Random(1),
        draw_token=partial(secrets.token_hex, 12),
        clock=clock,
        legs=LegSettings(reports_first_events=supervise is Supervise.FIRST_EVENT),
    )
    return ExtProcService(
        scheduler,
        (Telemetry(fleet, clock),),
        supervision=SupervisionSettings(mode=supervise),
        max_body=MAX_BODY,
        clock=clock,
    )


async def _serve(kind: str) -> None:
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers(((_EmptyServer() if kind == EMPTY else _service(Supervise(kind))).handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes the pipe
    await server.stop(None)


@dataclass(frozen=True)
class Server:
    """A server process under measurement."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads so far, in nanosecond resolution (Linux schedstat)."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def started(kind: str) -> Iterator[Server]:
    command = [sys.executable, __file__, "--serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Server(f"127.0.0.1:{int(process.stdout.readline())}", process.pid)
        process.stdin.close()


# --- the client: Envoy's part ---


def _request_headers(length: int) -> bytes:
    message = ProcessingRequest()
    forwarded = {":path": "/v1/chat/completions", ":method": "POST", "content-type": "application/json"}
    for name, value in {**forwarded, "content-length": str(length)}.items():
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    message.protocol_config.request_body_mode = ProcessingMode.BUFFERED
    return bytes(message.SerializeToString())


def _body(size: int) -> bytes:
    text = "The quick brown fox jumps over the lazy dog. "
    chat = {"model": "model", "messages": [{"role": "user", "content": ""}], "stream": True, "max_tokens": 256}
    missing = size - len(json.dumps(chat))
    chat["messages"][0]["content"] = (text * (missing // len(text) + 1))[:missing]  # type: ignore[index]
    return json.dumps(chat).encode()


def _response_headers() -> bytes:
    message = ProcessingRequest()
    header = message.response_headers.headers.headers.add()
    header.key, header.raw_value = ":status", b"200"
    return bytes(message.SerializeToString())


def _first_event() -> bytes:
    message = ProcessingRequest()
    message.response_body.body = b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0}]}\n\n'
    return bytes(message.SerializeToString())


def _leg_headers() -> bytes:
    message = ProcessingRequest()
    message.request_headers.SetInParent()
    return bytes(message.SerializeToString())


class Load:
    """A client that sends requests of one size to one server, a few at a time."""

    def __init__(self, size: int, concurrency: int, kind: str) -> None:
        self._kind = kind
        self._first_event = _first_event()
        self._leg_headers = _leg_headers()
        body = ProcessingRequest()
        body.request_body.body = _body(size)
        body.request_body.end_of_stream = True
        self._messages = (_request_headers(size), body.SerializeToString())
        self._response = _response_headers()
        self._concurrency = concurrency

    async def run(self, server: Server, requests: int) -> float:
        """Send so many requests.

        Returns CPU seconds of the server per request.
        """
        async with grpc.aio.insecure_channel(server.address, options=OPTIONS) as channel:
            call = channel.stream_stream(METHOD, None, None)
            await self._some(call, self._concurrency)  # connect
            before = server.cpu_seconds()
            share = requests // self._concurrency
            await asyncio.gather(*(self._some(call, share) for _ in range(self._concurrency)))
            return (server.cpu_seconds() - before) / (share * self._concurrency)

    async def _some(self, call: Any, count: int) -> None:
        for _ in range(count):
            stream = call()
            answer = b""
            for message in self._messages:
                await stream.write(message)
                answer = await stream.read()
            token = (contract.LEG, _leg_in(answer))
            leg = call(metadata=(token,))
            if self._kind in {Supervise.LEGS, Supervise.FIRST_EVENT}:
                await leg.write(self._leg_headers)
                await leg.read()
            await leg.write(self._response)
            await leg.read()
            await leg.done_writing()
            await stream.write(self._response)
            if self._kind == Supervise.FIRST_EVENT:
                first = call(metadata=(token, (contract.STAGE, contract.FIRST_EVENT)))
                await first.write(self._first_event)
                await first.read()
                assert await first.read() is grpc.aio.EOF
            await stream.read()
            await stream.done_writing()
            assert await leg.read() is grpc.aio.EOF
            assert await stream.read() is grpc.aio.EOF


def _leg_in(answer: bytes) -> str:
    for option in ProcessingResponse.FromString(answer).request_body.response.header_mutation.set_headers:
        if option.header.key == contract.LEG:
            return str(option.header.raw_value.decode())
    return "none"


# --- the comparison ---


async def _compare(requests: int, rounds: int, concurrency: int) -> list[dict[str, Any]]:
    results = []
    with ExitStack() as running:
        servers = {kind: running.enter_context(started(kind)) for kind in KINDS}
        for label, size in SIZES.items():
            loads = {mode.value: Load(size, concurrency, mode.value) for mode in Supervise}
            count = max(concurrency, requests // (10 if size >= 1_000_000 else 1))
            costs: dict[str, list[float]] = {mode: [] for mode in loads}
            empty: dict[str, list[float]] = {mode: [] for mode in loads}
            for index in range(rounds + 1):
                for mode in loads if index % 2 else reversed(loads):
                    constant = await loads[mode].run(servers[EMPTY], count)
                    cost = await loads[mode].run(servers[mode], count)
                    if index:  # the first round warms up
                        empty[mode].append(constant)
                        costs[mode].append(cost)
            for mode in loads:
                to_off = [mine / base for mine, base in zip(costs[mode], empty[Supervise.OFF], strict=True)]
                to_same = [mine / base for mine, base in zip(costs[mode], empty[mode], strict=True)]
                results.append({
                    "body": label,
                    "supervision": mode,
                    "empty_us": statistics.median(empty[mode]) * 1e6,
                    "service_us": statistics.median(costs[mode]) * 1e6,
                    "ratio": statistics.median(to_off),
                    "ratio_same_messages": statistics.median(to_same),
                    "ratios": [round(ratio, 3) for ratio in to_off],
                    "ratios_same_messages": [round(ratio, 3) for ratio in to_same],
                })  # fmt: skip
    return results


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Run the comparison, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400, help="per half of a round; a tenth of it for 1 MB bodies")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(_serve(args.serve))
        return
    results = uvloop.run(_compare(args.requests, args.rounds, args.concurrency))
    head = f"{'body':>6}  {'':>11}  {'empty':>10}  {'service':>10}  to empty with off  to empty with the same messages"
    print(f"{head} (median of {args.rounds}; least to most)")
    for row in results:
        print(
            f"{row['body']:>6}  {row['supervision']:>11}  {row['empty_us']:7.0f} us  {row['service_us']:7.0f} us  "
            f"{_spread(row['ratios']):>17}  {_spread(row['ratios_same_messages'])}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"cpus": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
