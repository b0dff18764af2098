"""Run ``dp-extproc engine``, a stand-in for an engine."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

import uvloop
from prometheus_client import disable_created_metrics

from dp_extproc.engines.model import in_url
from dp_extproc.lab.engine.api.app import Server
from dp_extproc.lab.engine.release import Release
from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.settings import EngineKind, Settings, Timeouts, Tls

_METHODS: Final = ("auto", "round_robin", "follow_bootstrap_room", "total_requests", "total_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; where SGLang has one of the same meaning it has the same name."""
    default = Settings()
    add = parser.add_argument
    add("--kind", type=EngineKind, choices=list(EngineKind), default=default.kind, help="whose contract it keeps")
    add("--role", type=Role, choices=list(Role), default=default.role, help="role of the engine")
    add("--dp-size", type=_positive, default=default.dp_size, metavar="N", help="DP ranks")
    add("--port", type=int, required=True)
    add("--host", default=default.host)
    add("--bootstrap-port", type=int, default=default.bootstrap_port, help="of prefill's bootstrap server")
    add("--debug-port", type=int, metavar="PORT", help="of /debug, besides the API port: for faults of the latter")
    add("--sglang-version", type=_release, default=default.release, metavar="X.Y.Z", help="release to behave like")
    add("--vllm-version", default=default.vllm_version, metavar="X.Y.Z", help="what a vLLM calls itself")
    add("--model", default=default.model, metavar="NAME", help="served model name")
    add("--dp-attention", action=argparse.BooleanOptionalAction, default=False, help="ranks take their steps together")
    add("--attn-tp-size", type=_positive, default=1, metavar="N", help="tensor-parallel ranks per DP rank")
    add("--load-balance-method", choices=_METHODS, default=default.load_balance_method)
    add("--enable-metrics", action=argparse.BooleanOptionalAction, default=True, help="serve /metrics")
    add("--header-overrides", action="store_true", help="SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1: read x-override-*")
    add("--force-query", action="store_true", help="SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK=1")
    add("--enable-pd-role-switch", action="store_true", help="let POST /pd_role_switch change the reported role")
    add("--warm-up", type=float, default=0.0, metavar="SECONDS", help="be not ready for so long after the start")
    add("--rank-listeners", action="store_true", help="SGLANG_RUST_SERVER=1: a listener per rank, at --port plus rank")
    add("--api-key", help="what clients have to show as bearer token")
    add("--tls-cert", metavar="FILE", help="serve TLS with this certificate")
    add("--tls-key", metavar="FILE", help="private key of --tls-cert")
    add("--tls-client-ca", metavar="FILE", help="require a certificate of this authority from clients")
    add("--context-length", type=_positive, default=default.context_length, metavar="TOKENS")
    add("--max-total-tokens", type=_positive, default=default.capacity, metavar="TOKENS", help="KV room per rank")
    add("--max-running-requests", type=_positive, default=default.max_running_requests, metavar="N")
    add(
        "--chunked-prefill-size", type=int, default=default.chunked_prefill_size, metavar="TOKENS", help="-1: no chunks"
    )
    add("--max-prefill-tokens", type=_positive, default=default.max_prefill_tokens, metavar="TOKENS")
    add("--num-reserved-decode-tokens", type=int, default=default.reserved_decode_tokens, metavar="TOKENS")
    add("--decode-log-interval", type=_positive, default=default.decode_log_interval, metavar="STEPS")
    add("--stream-interval", type=_positive, default=default.stream_interval, metavar="TOKENS", help="per chunk")
    add(
        "--vocabulary-size",
        type=_positive,
        default=default.vocabulary_size,
        metavar="N",
        help="a prompt with another token id ends the engine",
    )
    add("--page-size", type=_positive, default=default.page_size, metavar="TOKENS", help="of a KV cache page")
    add("--kv-cache-dtype", default=default.kv_cache_dtype, metavar="TYPE", help="of the KV cache")
    add("--disaggregation-transfer-backend", default=default.transfer_backend, metavar="NAME", help="moves KV caches")
    add("--disable-radix-cache", action="store_true", help="compute every prompt from its beginning")
    add("--enable-cache-report", action="store_true", help="report cached tokens in the usage of an answer")
    add("--lora-adapter", action="append", default=[], metavar="NAME", help="list this adapter; may be repeated")
    add(
        "--drain",
        type=float,
        metavar="SECONDS",
        help="after SIGTERM be not ready, serve, and end when no request runs at one of the looks in this interval",
    )
    add("--time-scale", type=float, default=1.0, metavar="FACTOR", help="of every duration: 0.1 is ten times faster")
    timeouts = parser.add_argument_group("SGLang's timeouts, in seconds before --time-scale")
    _add_fields(timeouts, Timeouts, "timeout")
    _add_fields(parser.add_argument_group("cost of a step, in seconds before --time-scale"), Costs, "cost")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        0 after a signal; 1 when a port cannot be listened on, or a file of TLS cannot be used.
    """
    settings = _settings(args)
    disable_created_metrics()  # type: ignore[no-untyped-call] # SGLang's registry is one without such series
    try:
        status: int = uvloop.run(_serve(settings))
    except OSError as error:
        sys.stderr.write(f"engine: {error}\n")
        return 1
    return status


async def _serve(settings: Settings) -> int:
    server = Server(settings)
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    async with server.engine.running():
        for listener in reversed(server.listeners.values()):  # the API port last: an engine that answers is complete
            await listener.open()
        sys.stdout.write(_ready_line(settings))
        sys.stdout.flush()
        if await signals.get() is signal.SIGTERM and settings.drain is not None:
            drained = asyncio.ensure_future(server.drain(settings.drain))
            await asyncio.wait((drained, asyncio.ensure_future(signals.get())), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*(listener.close() for listener in server.listeners.values()))
    return 0


def _ready_line(settings: Settings) -> str:
    like = f"vLLM {settings.vllm_version}" if settings.kind is EngineKind.VLLM else f"SGLang {settings.release}"
    bootstrap = f", bootstrap port {settings.bootstrap_port}" if settings.role is Role.PREFILL else ""
    return (
        f"engine: {settings.role} with {settings.dp_size} DP ranks like {like} is ready on "
        f"{'http' if settings.tls is None else 'https'}://{in_url(settings.host)}:{settings.port}{bootstrap}\n"
    )


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Read the settings of an engine from its command line."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return _settings(parser.parse_args(arguments))


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        kind=args.kind,
        role=args.role,
        dp_size=args.dp_size,
        port=args.port,
        host=args.host,
        bootstrap_port=args.bootstrap_port,
        debug_port=args.debug_port,
        release=args.sglang_version,
        vllm_version=args.vllm_version,
        model=args.model,
        dp_attention=args.dp_attention,
        attn_tp_size=args.attn_tp_size,
        load_balance_method=args.load_balance_method,
        enable_metrics=args.enable_metrics,
        header_overrides=args.header_overrides,
        force_query=args.force_query,
        role_switch=args.enable_pd_role_switch,
        warm_up=args.warm_up,
        rank_listeners=args.rank_listeners,
        api_key=args.api_key,
        tls=_tls(args),
        context_length=args.context_length,
        capacity=args.max_total_tokens,
        max_running_requests=args.max_running_requests,
        chunked_prefill_size=args.chunked_prefill_size,
        max_prefill_tokens=args.max_prefill_tokens,
        reserved_decode_tokens=args.num_reserved_decode_tokens,
        decode_log_interval=args.decode_log_interval,
        stream_interval=args.stream_interval,
        vocabulary_size=args.vocabulary_size,
        page_size=args.page_size,
        kv_cache_dtype=args.kv_cache_dtype,
        transfer_backend=args.disaggregation_transfer_backend,
        disable_radix_cache=args.disable_radix_cache,
        enable_cache_report=args.enable_cache_report,
        lora_adapters=tuple(args.lora_adapter),
        drain=args.drain,
        time_scale=args.time_scale,
        timeouts=Timeouts(**_values(args, Timeouts, "timeout")),
        costs=Costs(**_values(args, Costs, "cost")),
    )


def _tls(args: argparse.Namespace) -> Tls | None:
    return None if args.tls_cert is None else Tls(args.tls_cert, args.tls_key, args.tls_client_ca)


def _add_fields(group: Any, kind: type[Timeouts] | type[Costs], prefix: str) -> None:
    for each in fields(kind):
        number = int if each.type is int else float
        group.add_argument(f"--{prefix}-{each.name.replace('_', '-')}", type=number, default=each.default)


def _values(args: argparse.Namespace, kind: type[Timeouts] | type[Costs], prefix: str) -> dict[str, Any]:
    return {each.name: getattr(args, f"{prefix}_{each.name}") for each in fields(kind)}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _release(text: str) -> Release:
    try:
        return Release.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command by itself."""
    parser = argparse.ArgumentParser(prog="dp-extproc engine", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))
