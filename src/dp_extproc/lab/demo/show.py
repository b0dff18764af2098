"""Run the demo: the same requests by the engines' own placement and by the service's, on stand-in engines."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from rich.console import Console

from dp_extproc.lab.demo.contest import Contender, Contest, Load, turns
from dp_extproc.lab.demo.estimate import expected_seconds, in_words
from dp_extproc.lab.demo.fleet import (
    ENGINES_OWN,
    MODEL,
    OURS,
    PER_ROLE,
    RANKS,
    Fleet,
    Placement,
    Router,
    run_engines,
)
from dp_extproc.lab.demo.interrupts import Interrupts
from dp_extproc.lab.demo.jobs import make_jobs
from dp_extproc.lab.demo.report import About, print_report

_PLACEMENTS: Final = (ENGINES_OWN, OURS)


def show(
    console: Console,
    interrupts: Interrupts,
    *,
    requests: int,
    seed: int,
    concurrency: int,
    time_scale: float,
    keep: bool,
) -> None:
    """Run everything and print the results.

    Raises:
        RuntimeError: A part cannot be started.
        KeyboardInterrupt: A signal came; everything has been stopped.
    """
    jobs = make_jobs(requests, seed)
    parts = [part for _, part in turns(len(_PLACEMENTS), jobs)]
    seconds = expected_seconds(parts, concurrency, time_scale, engines=PER_ROLE, ranks=RANKS)
    console.print(
        f"Starting {PER_ROLE} prefill and {PER_ROLE} decode engines of {RANKS} ranks each, the router and Envoy; "
        f"{requests} requests of uneven length, every other one streamed, for each of two placements. "
        f"This takes {in_words(seconds)}, and longer on a busy machine.",
        highlight=False,
    )
    with run_engines(time_scale, interrupts) as fleet:
        contenders = [Contender(placement.name, _runner(fleet, placement)) for placement in _PLACEMENTS]
        engines = {name: engine.url for name, engine in fleet.named().items()}
        runs = Contest(contenders, engines, Load(jobs, concurrency, MODEL), console, interrupts).hold()
        print_report(console, runs, About(jobs, list(engines), is_all_here=True, remedy=_remedy(time_scale)))
        if keep:
            with fleet.router(OURS) as router:
                _keep(console, router, interrupts)


def _runner(fleet: Fleet, placement: Placement) -> Callable[[], AbstractContextManager[str]]:
    @contextmanager
    def run() -> Iterator[str]:
        with fleet.router(placement) as router:
            yield router.envoy.url

    return run


def _remedy(time_scale: float) -> str:
    return (
        "Give this machine less to do in the same time, with slower engines: "
        f"dp-extproc demo --time-scale {2 * time_scale:g}"
    )


def _keep(console: Console, router: Router, interrupts: Interrupts) -> None:
    url = router.envoy.url
    body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "hello"}}], "max_tokens": 12}}'
    console.print("\nIt goes on running. Try:\n", highlight=False)
    console.print(
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n"
        f"  curl {router.service.admin_url}/loads\n",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    interrupts.invite()
    console.print("Ctrl-C ends it.")
    interrupts.wait()
