"""Run ``dp-extproc demo``: compare the engines' own placement with the service's, on this machine."""

import argparse
import math
from functools import partial
from typing import Final

from rich.console import Console

from dp_extproc.lab.demo.interrupts import Interrupts
from dp_extproc.lab.demo.options import add_traffic, end_help_with_missing_parts, run_command

_REQUESTS: Final = 800
"""Four hundred for each half: ten seconds, in which every rank serves twenty-five requests with either placement."""
_CONCURRENCY: Final = 80
"""Enough that every rank has work most of the time: five requests for each of the sixteen ranks."""
_TIME_SCALE: Final = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    end_help_with_missing_parts(parser, needs_envoy=True)
    add_traffic(parser, requests=_REQUESTS, concurrency=_CONCURRENCY)
    parser.add_argument(
        "--time-scale", type=_scale, default=_TIME_SCALE, metavar="FACTOR",
        help="how slow the engines are: the larger, the less the machine has to do (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave it running at the end")


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        0, also when a signal ends what --keep has left running; 1 when a part cannot be started; 128 and the number of
        the signal that ended it before.
    """
    return run_command("demo", partial(_show, args), needs_envoy=True)


def _show(args: argparse.Namespace, console: Console, interrupts: Interrupts) -> None:
    # The OpenAI client takes a second to import, and belongs to an extra.
    from dp_extproc.lab.demo.show import show  # noqa: PLC0415

    show(
        console,
        interrupts,
        requests=args.requests,
        seed=args.seed,
        concurrency=args.concurrency,
        time_scale=args.time_scale,
        keep=args.keep,
    )


def _scale(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise ValueError
    return number
