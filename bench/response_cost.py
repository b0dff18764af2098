"""Measure what each piece of a response costs in the service, where a gateway sends response bodies in full duplex.

An endpoint picker needs the head of a response, not its body. Gateways that send bodies all the same cost the service a
message for each piece. The empty server answers each message with a constant, and so shows what gRPC alone costs.

The benchmark measures the CPU time of the server process, which hardly depends on other load of the machine. Rounds are
interleaved. ``--other DIR`` adds the service of another source tree.

    python -m bench.response_cost [--pieces 3000] [--rounds 7] [--other DIR/src]
"""

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio
import uvloop
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

from dp_extproc import contract
from dp_extproc.attempt.gateways import EndpointPicker
from dp_extproc.config import PoolConfig
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Mode, RankSample, Role, Version
from dp_extproc.extproc.service import SERVICE_NAME, ExtProcService
from dp_extproc.load.cache import LoadCache
from dp_extproc.observability.metrics import Telemetry
from dp_extproc.scheduling.scheduler import Scheduler

METHOD: Final = f"/{SERVICE_NAME}/Process"
OPTIONS: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
EMPTY: Final = "empty"
SERVICE: Final = "service"
STREAMS: Final = (1, 16)
RANKS: Final = 4
URL: Final = "http://127.0.0.1:31001"
EVENT: Final = b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'


# --- the servers ---


class _EmptyServer:
    """The ext_proc server that answers every message with a constant, and reads none."""

    async def process(self, _requests: object, context: Any) -> None:
        answer = ProcessingResponse()
        answer.response_body.response.body_mutation.streamed_response.body = EVENT
        constant = answer.SerializeToString()
        while await context.read() is not grpc.aio.EOF:
            await context.write(constant)

    def handler(self) -> Any:
        process = grpc.stream_stream_rpc_method_handler(self.process, None, None)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"Process": process})


def _service() -> ExtProcService:
    """Make an endpoint picker with one worker, which has been discovered and sampled."""
    clock = time.monotonic
    endpoint = Endpoint(URL, "127.0.0.1", int(URL.rpartition(":")[2]), "*", Role.WORKER)
    loads = LoadCache([endpoint], stale_after=1e9)
    facts = EngineFacts(version=Version(0, 5, 23), dp_ranks=RANKS, mode=Mode.UNIFIED, dp_attention=True)
    loads.discovered(endpoint, URL.removeprefix("http://"), facts, clock())
    loads.sampled(endpoint, LoadPage(tuple(RankSample(rank, 0, age=0.0) for rank in range(RANKS))), clock(), clock())
    pool = PoolConfig.model_validate({"models": ["*"], "workers": {"endpoints": [URL]}})
    scheduler = Scheduler(
        [pool], loads, owner="127.0.0.1:9002", rng=random.Random(1), draw_token=lambda: "unused", clock=clock
    )
    return ExtProcService(
        scheduler, (Telemetry(loads, clock),), gateway=EndpointPicker(), max_body=64 << 20, clock=clock
    )


async def _serve(kind: str) -> None:
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers(((_EmptyServer() if kind == EMPTY else _service()).handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the parent closes the pipe
    await server.stop(None)


@dataclass(frozen=True)
class Server:
    """A process under measurement. This module imports no other benchmark, so that an older source tree can run it."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads so far, in nanosecond resolution (Linux schedstat)."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def _started(kind: str, source: str | None) -> Iterator[Server]:
    environment = os.environ if source is None else {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-m", "bench.response_cost", "--serve", kind]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Server(f"127.0.0.1:{int(process.stdout.readline())}", process.pid)
        process.stdin.close()


# --- the gateway ---


def _before() -> tuple[bytes, ...]:
    """Write the messages before the body of the response, as a gateway with full duplex in both directions does."""
    headers, body, answer = ProcessingRequest(), ProcessingRequest(), ProcessingRequest()
    for name, value in {":path": "/v1/chat/completions", ":method": "POST"}.items():
        header = headers.request_headers.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    headers.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    headers.protocol_config.response_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    body.request_body.body = b'{"messages":[{"role":"user","content":"hi"}],"stream":true}'
    body.request_body.end_of_stream = True
    header = answer.response_headers.headers.headers.add()
    header.key, header.raw_value = ":status", b"200"
    return headers.SerializeToString(), body.SerializeToString(), answer.SerializeToString()


def _piece() -> bytes:
    """Write a piece with the metadata that a gateway forwards with each message."""
    message = ProcessingRequest()
    message.response_body.body = EVENT
    served = message.metadata_context.filter_metadata[contract.LB_NAMESPACE]
    served.fields[contract.DESTINATION].string_value = "127.0.0.1:31001"
    return bytes(message.SerializeToString())


async def _measure(server: Server, streams: int, pieces: int) -> float:
    """Return CPU seconds of the server for each piece of a response."""
    piece = _piece()

    async def pass_pieces(stream: Any) -> None:
        for _ in range(pieces // streams):
            await stream.write(piece)
            await stream.read()

    async with grpc.aio.insecure_channel(server.address, options=OPTIONS) as channel:
        call = channel.stream_stream(METHOD, None, None)
        open_streams = [call() for _ in range(streams)]
        for stream in open_streams:
            for message in _before():
                await stream.write(message)
            for _ in range(3):
                await stream.read()
        before = server.cpu_seconds()
        await asyncio.gather(*map(pass_pieces, open_streams))
        cost: float = (server.cpu_seconds() - before) / (pieces // streams * streams)
        for stream in open_streams:
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        return cost


async def _compare(pieces: int, rounds: int, others: list[str]) -> None:
    with ExitStack() as running:
        servers = {EMPTY: running.enter_context(_started(EMPTY, None))}
        servers[SERVICE] = running.enter_context(_started(SERVICE, None))
        for source in others:
            servers[source] = running.enter_context(_started(SERVICE, source))
        print(f"CPU time for each piece (median of {rounds}; least to most), and the ratio to the empty server")
        for streams in STREAMS:
            costs: dict[str, list[float]] = {name: [] for name in servers}
            for index in range(rounds + 1):
                for name in servers if index % 2 else reversed(servers):
                    cost = await _measure(servers[name], streams, pieces)
                    if index:  # the first round warms up
                        costs[name].append(cost * 1e6)
            for name, found in costs.items():
                ratio = statistics.median(mine / least for mine, least in zip(found, costs[EMPTY], strict=True))
                spread = f"{statistics.median(found):5.0f} us ({min(found):.0f} to {max(found):.0f})"
                print(f"{streams:3} streams  {name:20}  {spread}  {ratio:.2f}")


def main() -> None:
    """Run the comparison, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=3000, help="pieces of responses per half of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--other", action="append", default=[], metavar="DIR", help="another tree's src")
    parser.add_argument("--serve", choices=(EMPTY, SERVICE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(_serve(args.serve))
        return
    uvloop.run(_compare(args.pieces, args.rounds, args.other))


if __name__ == "__main__":
    main()
