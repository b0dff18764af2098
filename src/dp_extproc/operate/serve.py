"""The life of the service: start everything in order, serve, drain, stop."""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio

from dp_extproc import __version__
from dp_extproc.config import Config, ConfigError, SocketAddress, Supervise, load_config
from dp_extproc.extproc.service import ExtProcService
from dp_extproc.fleet.roster import endpoints_of
from dp_extproc.fleet.scraper import Scraper
from dp_extproc.operate.admin import AdminServer, admin_app
from dp_extproc.operate.loads_page import describe_loads
from dp_extproc.operate.readiness import Readiness, can_serve
from dp_extproc.operate.sync_page import SyncMetrics, describe_sync
from dp_extproc.operate.telemetry import Telemetry
from dp_extproc.placement.attempt import NOBODY
from dp_extproc.placement.dispatcher import Dispatcher
from dp_extproc.placement.fleet_load import FleetLoad
from dp_extproc.placement.load import StepCosts
from dp_extproc.placement.queue import WaitingLine
from dp_extproc.placement.retries import RetryBudget
from dp_extproc.sync.join import join
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.replica import Replica

_MESSAGE_SLACK: Final = 1 << 20
"""Bytes of a gRPC message beyond the body: request headers and framing. gRPC's own limit of 4 MiB is too small."""
_POLL_SECONDS: Final = 0.05

_log = logging.getLogger(__name__)


class StartError(Exception):
    """The service cannot start; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``dp-extproc serve`` takes."""
    parser.add_argument("-c", "--config", type=Path, required=True, help="configuration file")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for chatty in ("httpx", "uvicorn"):  # the one logs every scrape, the other its own start
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        config = load_config(args.config)
        uvloop.run(_serve(config))
    except (ConfigError, StartError) as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def owner_address(config: Config) -> str:
    """Give the ``IP:port`` under which Envoy reaches this very process.

    Raises:
        StartError: The service listens on a wildcard address and this host's own address is not known.
    """
    listen = config.listen
    if listen.advertise is not None:
        return str(listen.advertise)
    if not listen.grpc.is_wildcard:
        return str(listen.grpc)
    try:
        # In a container or a pod the host name resolves to the address that others reach it by.
        host = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        message = f"this host's address is not known ({error}); set listen.advertise to the IP:port that Envoy reaches"
        raise StartError(message) from None
    return str(SocketAddress(host=host, port=listen.grpc.port))


async def _serve(config: Config) -> None:
    clock = time.monotonic
    rng = random.Random(os.urandom(32))
    endpoints = endpoints_of(config)
    costs = StepCosts(config.load.prefill_step_tokens, config.load.decode_request_tokens)
    fleet = FleetLoad(endpoints, config.load.stale_after, costs, config.health)
    line = None if config.queue is None else WaitingLine(config.queue)
    telemetry = Telemetry(fleet, clock)
    outbox = Outbox(f"{rng.getrandbits(64):016x}")
    dispatcher = Dispatcher(
        config.pools,
        fleet,
        owner=owner_address(config),
        rng=rng,
        clock=clock,
        signal=config.load.signal,
        observer=NOBODY if config.sync is None else outbox,
        admission=config.admission,
        line=line,
        sees_first_events=config.supervision.mode is Supervise.ANSWERS,
    )
    replica: Replica | None = None
    if config.sync is not None:
        replica = join(config.sync, outbox, dispatcher.ledger.open_foreign, clock=clock)
        telemetry.add(SyncMetrics(replica.status))
    service = ExtProcService(
        dispatcher,
        telemetry,
        supervision=config.supervision,
        budget=RetryBudget(config.retry),
        line=line,
        max_body=config.envoy.max_body_bytes,
        clock=clock,
    )
    health = aio.HealthServicer()
    readiness = Readiness(health, lambda: any(can_serve(pool, fleet, clock()) for pool in config.pools))
    admin = AdminServer(
        admin_app(
            metrics=telemetry.page,
            ready=lambda: readiness.ready,
            loads=lambda: {
                **describe_loads(fleet, clock()),
                "sync": None if replica is None else describe_sync(replica.status()),
            },
        ),
        _bind(config.listen.admin, "listen.admin"),
    )
    scraper = Scraper(endpoints, config.load, telemetry, clock=clock, rng=rng)
    stopping = _stop_signals()
    async with _grpc_server(config, service, health), asyncio.TaskGroup() as tasks:
        background = [
            tasks.create_task(scraper.run()),
            tasks.create_task(readiness.run()),
            tasks.create_task(service.sweep()),
        ]
        if replica is not None:
            background.append(tasks.create_task(_take_part(replica, fleet)))
        admin_task = tasks.create_task(admin.run_on_socket())
        _log.info("dp-extproc %s: ext_proc on %s, admin on %s", __version__, config.listen.grpc, config.listen.admin)
        await stopping.wait()
        _log.info("stopping: not ready from now on, answering for another %gs", config.drain)
        await readiness.stop()
        stopping.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), config.drain)  # a second signal cuts it short
        for task in background:
            task.cancel()
        admin.should_exit = True
        await admin_task


async def _take_part(replica: Replica, fleet: FleetLoad) -> None:
    """Join the other replicas once every engine has been tried: what they tell of unknown ones would be left out."""
    while not all(each.url in fleet.hosts or each.url in fleet.failures for each in fleet.endpoints):  # noqa: ASYNC110 - the load cache tells nobody
        await asyncio.sleep(_POLL_SECONDS)
    await replica.run()


def _bind(address: SocketAddress, key: str) -> socket.socket:
    try:
        return socket.create_server(
            (address.host, address.port), family=socket.AF_INET6 if ":" in address.host else socket.AF_INET
        )
    except OSError:
        raise _cannot_listen(address, key) from None


def _cannot_listen(address: SocketAddress, key: str) -> StartError:
    return StartError(f"cannot listen on {address} ({key}): is another process using the port?")


def _stop_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    return stopping


@contextlib.asynccontextmanager
async def _grpc_server(config: Config, service: ExtProcService, health: aio.HealthServicer) -> AsyncIterator[None]:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.envoy.max_body_bytes + _MESSAGE_SLACK),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that is taken must be an error, not half of the streams
        ]
    )
    server.add_generic_rpc_handlers((service.handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        server.add_insecure_port(str(config.listen.grpc))
    except RuntimeError:
        raise _cannot_listen(config.listen.grpc, "listen.grpc") from None
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace=1.0)
