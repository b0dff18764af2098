"""``dp-extproc demo``: the engines' own placement against ours, on this machine."""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dp_extproc.demo.fleet import ENGINES_OWN, OURS, RANKS, SERVERS, Fleet, Placement, Router, run_engines
from dp_extproc.demo.probe import watch
from dp_extproc.demo.report import Run, print_report
from dp_extproc.demo.traffic import MODEL, Job, make_jobs, send

_CONCURRENCY: Final = 80
"""Enough that every rank has work most of the time: five requests for each of the sixteen ranks."""
_WARM_UP: Final = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--requests", type=int, default=400, help="per placement (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the traffic (default: %(default)s)")
    parser.add_argument("--time-scale", type=float, default=3.0, help="how slow the engines are (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave it running at the end")


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 0, or 1 when a part cannot be started."""
    # Wide enough for the tables also when the output is not a terminal.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _show(console, args)
    except (FileNotFoundError, RuntimeError) as error:
        console.print(f"[bold]The demo cannot go on:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
    return 0


def _show(console: Console, args: argparse.Namespace) -> None:
    jobs = make_jobs(args.requests, args.seed)
    console.print(
        f"Starting {SERVERS} prefill and {SERVERS} decode engines of {RANKS} ranks each, the router and Envoy; "
        f"{args.requests} requests of uneven length, every other one streamed, once for each placement."
    )
    with run_engines(args.time_scale) as fleet:
        runs = [_run(console, fleet, placement, jobs) for placement in (ENGINES_OWN, OURS)]
        print_report(console, runs)
        if args.keep:
            with fleet.router(OURS) as router:
                _keep(console, router)


def _run(console: Console, fleet: Fleet, placement: Placement, jobs: list[Job]) -> Run:
    columns = (TextColumn(f"placement: {placement.name:<17}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with fleet.router(placement) as router, Progress(*columns, console=console) as progress:
        task = progress.add_task(placement.name, total=len(jobs))
        return asyncio.run(_measure(router.envoy.url, fleet, placement, jobs, lambda: progress.advance(task)))


async def _measure(url: str, fleet: Fleet, placement: Placement, jobs: list[Job], on_done: Callable[[], None]) -> Run:
    await send(url, make_jobs(_WARM_UP, seed=0), _WARM_UP, lambda: None)
    fleet.forget()
    urls = {server: engine.url for server, engine in fleet.named().items()}
    async with watch(urls) as probe:
        began = time.perf_counter()
        outcomes = await send(url, jobs, _CONCURRENCY, on_done)
        seconds = time.perf_counter() - began
    return Run(placement.name, seconds, outcomes, await asyncio.to_thread(fleet.shares, probe), probe)


def _keep(console: Console, router: Router) -> None:
    url = router.envoy.url
    body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "hello"}}], "max_tokens": 12}}'
    console.print("\nIt goes on running. Try:\n", highlight=False)
    console.print(
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n"
        f"  curl {router.service.admin_url}/loads\n",
        highlight=False,
        soft_wrap=True,
    )
    console.print("Ctrl-C ends it.")
    signal.pause()
