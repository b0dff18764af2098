"""Test the printed report, and when it is marked invalid."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from dp_extproc.lab.demo.contest import Run
from dp_extproc.lab.demo.jobs import Job, Outcome
from dp_extproc.lab.demo.machine import Spent
from dp_extproc.lab.demo.probe import LoadProbe
from dp_extproc.lab.demo.report import About, print_report
from dp_extproc.lab.demo.standin import Account, Received

_SHORT, _LONG = Job("a" * 40, 20, stream=True), Job("a" * 4000, 100, stream=True)
_JOBS = [_SHORT, _LONG, _SHORT, _LONG]
_QUIET = Spent(10.0, 2.0, (2000, 1000, 900))
"""Ten seconds of two processors: half busy, a twentieth by others."""


def _run(name: str, spent: Spent = _QUIET, *, late: float = 0.0, outcomes: list[Outcome] | None = None) -> Run:
    probe = LoadProbe()
    for engine in ("prefill 1", "decode 1"):
        for _ in range(100):
            probe.note(engine, {0: 100, 1: 300})
    if outcomes is None:
        outcomes = [Outcome(job, 1.0, 0.2, 0.050 if job is _LONG else 0.030) for job in _JOBS]
    received = {("prefill 1", 0): Received(4, 1234)}
    return Run(name, probe, outcomes, 10.0, spent, Account(received, stepping=10.0, late=late))


def _print(*runs: Run, is_all_here: bool = True, engines: tuple[str, ...] = ("prefill 1", "decode 1")) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    print_report(console, runs, About(_JOBS, engines, is_all_here, "Slow the engines down."))
    return console.export_text()


def _row(printed: str, label: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if f"│ {label} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_report_is_valid_on_a_quiet_machine() -> None:
    """There is no warning, and long and short requests are apart."""
    faster = [Outcome(job, 1.0, 0.1, 0.060 if job is _LONG else 0.015) for job in _JOBS]
    printed = _print(_run("own"), _run("ours", outcomes=faster))

    assert "NOTHING" not in printed
    assert "Do not compare" not in printed
    assert _row(printed, "time to first token, mean") == ["200 ms", "100 ms (-50 %)"]
    assert _row(printed, "time per output token of long requests, mean") == ["50.0 ms", "60.0 ms (+20 %)"]
    assert _row(printed, "time per output token of short requests, mean") == ["30.0 ms", "15.0 ms (-50 %)"]
    assert _row(printed, "this machine's processors, used by other programs") == ["5%", "5%"]
    assert _row(printed, "fullest prefill rank of a server against its average") == ["1.50 x", "1.50 x (+0 %)"]
    assert "more than 565 tokens of prompt and output together" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (_run("ours", replace(_QUIET, machine=(2000, 1200, 900))), "ours: other programs used 15% of the processors"),
        (_run("ours", replace(_QUIET, machine=(2000, 1900, 1890))), "ours: the processors were 95% busy"),
        (_run("ours", replace(_QUIET, client=9.5)), "ours: the client used 95% of one processor"),
        (_run("ours", late=0.5), "ours: the engines' steps took 5% longer than they should"),
    ],
    ids=["others", "busy", "client", "late"],
)
def test_report_is_invalid_on_a_busy_machine(run: Run, reason: str) -> None:
    """The table has a mark, with the reason and the remedy, also when one placement only was affected."""
    printed = _print(_run("own"), run)

    assert "What it means - NOTHING: the machine was too busy" in printed
    assert reason in printed
    assert "own: " not in printed
    assert ("Close other programs on this machine" in printed) == ("other programs" in reason)
    assert ("Slow the engines down." in printed) == ("other programs" not in reason)


def test_remote_engines_do_not_count_as_other_programs() -> None:
    """Running routers and engines may be on this machine or not: their share is not counted against the result."""
    printed = _print(_run("mine", replace(_QUIET, machine=(2000, 1200, 100))), is_all_here=False)

    assert "NOTHING" not in printed
    assert "other programs" not in printed


@pytest.mark.parametrize("machine", [None, (0, 0, 0)])
def test_report_names_what_it_cannot_measure(machine: tuple[int, int, int] | None) -> None:
    """That is so without /proc, or with one of zeros; the measures of the process itself still count."""
    printed = _print(_run("own", replace(_QUIET, machine=machine)))

    assert _row(printed, "this machine's processors, busy") == ["not measurable here"]
    assert _row(printed, "the client, of one processor") == ["20%"]
    assert "How busy this machine was cannot be measured here" in printed


def test_report_lists_failures_if_all_requests_failed() -> None:
    """Means are dashes, and every kind of failure has its number, whatever its text."""
    errors = [Outcome(_SHORT, 1.0, error="[red]a page[/]"), *[Outcome(_LONG, 1.0, error="timed out")] * 3]
    printed = _print(_run("own", outcomes=errors), _run("ours"))

    assert _row(printed, "time to first token, mean") == ["-", "200 ms"]
    assert _row(printed, "time per output token, mean")[0] == "-"
    assert _row(printed, "failed requests") == ["4", "0"]
    assert "own: 4 requests failed; the times are of the others." in printed
    assert "3 x timed out" in printed
    assert "1 x [red]a page[/]" in printed


def test_failed_requests_do_not_count_in_times() -> None:
    """A stream that broke has a first token, but it was not answered."""
    outcomes = [Outcome(_SHORT, 1.0, 0.1, 0.01), Outcome(_SHORT, 1.0, 9.9, 9.9, error="a stream that ended early")]

    assert _row(_print(_run("own", outcomes=outcomes)), "time to first token, mean") == ["100 ms"]


def test_report_names_an_undersampled_engine() -> None:
    """More than one sample in twenty failed, or there was none; one failure in a hundred is no problem."""
    run = _run("own")
    run.probe.note_failure("prefill 1", "/v1/loads answers 503")
    assert "looks at the load" not in _print(run)
    for _ in range(9):
        run.probe.note_failure("prefill 1", "/v1/loads answers 503")

    printed = _print(run, engines=("prefill 1", "decode 1", "decode 2"))
    assert "own: 10 of 110 looks at the load of prefill 1 failed: /v1/loads answers 503" in printed
    assert "looks at the load of decode 2 failed: it was never looked at" in printed
    assert "decode 1 failed" not in printed
