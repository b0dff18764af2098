"""The life of one process that schedules requests: start the components in order, serve, drain, stop."""

import asyncio
import contextlib
import logging
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Final

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio

from dp_extproc import __version__
from dp_extproc.background import Guard
from dp_extproc.config import Config, ConfigSource, SocketAddress, ignore
from dp_extproc.extproc.service import ExtProcService
from dp_extproc.observability.admin import AdminServer
from dp_extproc.runtime.components import Components
from dp_extproc.runtime.garbage import tune_collections
from dp_extproc.runtime.reload import Reloader
from dp_extproc.runtime.secrets import server_credentials
from dp_extproc.runtime.sockets import StartError, cannot_listen, listen, listen_privately, owner_address
from dp_extproc.runtime.worker_context import WorkerContext, worker_config

_MESSAGE_SLACK: Final = 1 << 20
"""Bytes that a gRPC message may have beyond the body, for headers and framing. gRPC's own limit is 4 MiB in all."""

_log = logging.getLogger(__name__)


async def serve(written: Config, text: str, source: ConfigSource, context: WorkerContext | None = None) -> None:
    """Serve until a signal, or until the parent process has ended.

    *written* is the configuration in *text*, which *source* gave. A worker process has a *context*, and takes its share
    of the configuration.

    Raises:
        StartError: A port is taken.
    """
    config = worker_config(written, context)
    guard = Guard()
    rng = random.Random(os.urandom(32))
    health = aio.HealthServicer()
    components = Components(config, health, owner=owner_address(config), clock=time.monotonic, rng=rng, guard=guard)
    warn = None if context is None else ignore  # of several processes the parent logs the old names in the file
    reloader = Reloader(
        source, text, written, lambda config, _text: components.apply(worker_config(config, context)), warn
    )
    if context is None:
        components.telemetry.add(reloader)
        admin_socket = listen(config.listen.admin, "listen.admin")
    else:
        admin_socket = listen_privately(context.admin_socket)
    admin = AdminServer(components, admin_socket)
    tune_collections()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, reloader.request)
    if context is not None:
        context.watch_parent(on_reload=reloader.request, on_exit=stopping.set)
    with admin_socket, _start_error_alone():
        async with asyncio.TaskGroup() as tasks:
            work = {**components.tasks(), "reload": reloader.run}
            background = [tasks.create_task(guard.keep(name, each), name=name) for name, each in work.items()]
            admin_task = tasks.create_task(guard.keep("admin", admin.run_on_socket))
            await components.first_round()  # else the first requests find no endpoint
            async with _grpc_server(config, components.service, health, stopping):
                where = config.listen.admin if context is None else "the parent's port"
                _log.info("dp-extproc %s: ext_proc on %s, admin on %s", __version__, config.listen.grpc, where)
                await stopping.wait()
                drain = components.config.drain
                _log.info("stopping: not ready from now on, answering for another %gs", drain)
                await components.readiness.stop()
                stopping.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(drain):
                        await stopping.wait()  # a second signal cuts it short
            for task in background:
                task.cancel()
            admin.should_exit = True
            await admin_task


@contextlib.contextmanager
def _start_error_alone() -> Iterator[None]:
    """Raise a :class:`StartError` alone, without the exception group that a task group makes of it."""
    try:
        yield
    except ExceptionGroup as errors:
        refused = errors.subgroup(StartError)
        if refused is not None:
            raise refused.exceptions[0] from None
        raise


def _keepalive(seconds: float) -> list[tuple[str, int]]:
    """Return gRPC options that end the streams, and so the reservations, of an Envoy whose machine is lost."""
    milliseconds = max(1, round(seconds * 1000))
    return [
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.ping_timeout_ms", milliseconds),  # applies to these pings too, and is a minute by default
        ("grpc.keepalive_permit_without_calls", 1),
        # A stream carries no data while an engine computes. By default the third ping waits until data was sent.
        ("grpc.http2.max_pings_without_data", 0),
        # Envoy pings too. By default gRPC closes a connection after more than two pings within five minutes.
        ("grpc.http2.max_ping_strikes", 0),
    ]


@contextlib.asynccontextmanager
async def _grpc_server(
    config: Config, service: ExtProcService, health: aio.HealthServicer, cut_short: asyncio.Event
) -> AsyncIterator[None]:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.envoy.max_body_bytes + _MESSAGE_SLACK),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a port that is taken must be an error; shared, it would get half of the streams
            *_keepalive(config.listen.keepalive),
        ]
    )
    server.add_generic_rpc_handlers((service.handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address, tls = config.listen.grpc, config.listen.tls
    try:
        if tls is None:
            server.add_insecure_port(str(address))
        else:
            server.add_secure_port(str(address), server_credentials(tls))
    except RuntimeError:
        raise cannot_listen(address, "listen.grpc") from None
    async with _health_port(config.listen.health, health):
        await server.start()
        try:
            yield
        finally:
            await service.leave(cut_short)
            await server.stop(grace=1.0)
            await service.close()


@contextlib.asynccontextmanager
async def _health_port(address: SocketAddress | None, health: aio.HealthServicer) -> AsyncIterator[None]:
    """Serve health checks alone at a further address, if there is one."""
    if address is None:
        yield
        return
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        server.add_insecure_port(str(address))
    except RuntimeError:
        raise cannot_listen(address, "listen.health") from None
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace=None)
