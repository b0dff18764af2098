"""Run ``dp-extproc load``: send the demo's requests through routers that run already, and print the same tables."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Final
from urllib.parse import urlsplit

from rich.console import Console

from dp_extproc.engines.model import in_url
from dp_extproc.fleet.discovery.answers import Answer
from dp_extproc.fleet.discovery.system_look_up import look_up_by_system
from dp_extproc.lab.demo.interrupts import Interrupts
from dp_extproc.lab.demo.options import add_traffic, end_help_with_missing_parts, run_command

_REQUESTS: Final = 400
_CONCURRENCY: Final = 80
"""Five requests for each of sixteen ranks, as in the demo."""
_REMEDY: Final = (
    "Close other programs on this machine, or send fewer requests at a time (--concurrency). "
    "Stand-in engines that are late need a larger --time-scale."
)

_Named = tuple[str, str]
"""A name and a URL."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    end_help_with_missing_parts(parser, needs_envoy=False)
    add = parser.add_argument
    add(
        "--router", action="append", type=_named, required=True, metavar="NAME=URL", dest="routers",
        help="where clients send requests; several are compared with the first, in turns",
    )  # fmt: skip
    add(
        "--engine", action="append", type=_named, default=[], metavar="NAME=URL", dest="engines",
        help="an engine whose ranks are watched; its name begins with prefill or decode, such as 'prefill 1'. "
        "All engines behind a host name with several addresses are watched, and numbered",
    )  # fmt: skip
    add("--model", default="any", metavar="NAME", help="to name in the requests (default: %(default)s)")
    add_traffic(parser, requests=_REQUESTS, concurrency=_CONCURRENCY)


def run(args: argparse.Namespace) -> int:
    """Send and print. Returns 0, 1 when a router answers nothing, or 128 and the number of a signal."""
    return run_command("load", partial(_measure, args), needs_envoy=False)


def _measure(args: argparse.Namespace, console: Console, interrupts: Interrupts) -> None:
    # The OpenAI client takes a second to import, and belongs to an extra.
    from dp_extproc.lab.demo.contest import Contender, Contest, Load  # noqa: PLC0415
    from dp_extproc.lab.demo.jobs import make_jobs  # noqa: PLC0415
    from dp_extproc.lab.demo.report import About, print_report  # noqa: PLC0415

    jobs = make_jobs(args.requests, args.seed)
    engines = dict(each_engine(args.engines))
    contenders = [Contender(name, _at(url)) for name, url in args.routers]
    runs = Contest(contenders, engines, Load(jobs, args.concurrency, args.model), console, interrupts).hold()
    print_report(console, runs, About(jobs, list(engines), is_all_here=False, remedy=_REMEDY))


def each_engine(
    engines: Iterable[_Named], look_up: Callable[[str, int], Answer] = look_up_by_system
) -> Iterator[_Named]:
    """Number the engines behind a host name with several addresses, and look up each name once."""
    for name, url in engines:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found = look_up(parts.hostname or "", port)
        except (OSError, UnicodeError):  # shown as an engine that gives no samples
            found = Answer()
        if len(found.addresses) < 2:
            yield name, url
            continue
        for number, each in enumerate(sorted(found.addresses), 1):
            yield f"{name} {number}", f"{parts.scheme}://{in_url(each.host)}:{port}{parts.path}"


def _at(url: str) -> Callable[[], AbstractContextManager[str]]:
    return lambda: nullcontext(url)


def _named(text: str) -> _Named:
    """Read ``NAME=URL``, or a URL alone, whose host and port are its name then."""
    if text.startswith(("http://", "https://")):
        text = f"{urlsplit(text).netloc}={text}"
    name, _, url = text.partition("=")
    if not name.strip() or not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL, such as 'prefill 1=http://prefill-1:30000'")
    return name.strip(), url.rstrip("/")
