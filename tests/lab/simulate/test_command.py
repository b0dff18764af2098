"""``dp-extproc simulate``: a table for a fleet and a trace of one's own."""

import json
from pathlib import Path

import pytest

from dp_extproc.cli import main
from dp_extproc.lab.simulate.settings import SETTINGS
from dp_extproc.lab.workload.generate import make_trace
from dp_extproc.lab.workload.trace import write_trace


def test_a_trace_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A JSONL trace and a small fleet give a row for each placement, and the numbers as JSON."""
    trace, numbers = tmp_path / "trace.jsonl", tmp_path / "numbers.json"
    trace.write_text("".join(write_trace(make_trace("azure", 80, 30.0, 1))), encoding="utf-8")
    fleet = ["--prefill", "2", "--decode", "1", "--ranks", "2"]
    policies = ["--policy", "lockstep/minimum_tokens", "--policy", "random/minimum_tokens/scraped"]
    status = main(["simulate", "--trace", str(trace), *fleet, *policies, "--seeds", "2", "--json", str(numbers)])
    (found,) = json.loads(numbers.read_text(encoding="utf-8")).values()

    assert status == 0
    assert list(found) == ["engines' own", "clairvoyant", "lockstep/minimum_tokens", "random/minimum_tokens/scraped"]
    assert all(each["ttft_mean"] > 0 for each in found.values())
    assert "of the clairvoyant's" in capsys.readouterr().out


def test_short_and_long_requests_are_shown_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the time per output token: in the table and in the numbers, with what each gains; for prefill alone not."""
    numbers = tmp_path / "numbers.json"
    small = ["--setting", "4p2d8-agent", "--requests", "60", "--prefill", "2", "--ranks", "2", "--rate", "4"]
    assert main(["simulate", *small, "--seeds", "2", "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    (found,) = json.loads(numbers.read_text(encoding="utf-8")).values()
    ours = found["lockstep/minimum_tokens"]
    (row,) = [line for line in shown.partition("time per output token")[2].splitlines() if "lockstep" in line]

    for kind in ("tpot", "tpot_short", "tpot_long", "tpot_longest"):
        assert f"{ours[f'{kind}_mean']:.2f}" in row
        assert f"{ours[f'{kind}_gain']:.1f} %" in row
    assert main(["simulate", *small, "--lengths", "seed-prompts", "--seeds", "1"]) == 0
    assert "time per output token" not in capsys.readouterr().out


def test_a_setting_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """What is given goes over the setting; blind and told replicas are two surroundings."""
    small = ["--setting", "4p2d8-agent", "--requests", "60", "--prefill", "2", "--ranks", "2", "--rate", "4"]
    statuses = [main(["simulate", *small, "--seeds", "1", "--replicas", "2", *sync]) for sync in ([], ["--sync", "20"])]

    assert statuses == [0, 0]
    assert "4p2d8-agent" in capsys.readouterr().out


def test_every_bad_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All at once, with the line."""
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1}\n{"arrival": -1}\nnonsense\n', encoding="utf-8"
    )

    assert main(["simulate", "--trace", str(path)]) == 2
    told = capsys.readouterr().err
    assert "line 2" in told
    assert "line 3" in told


@pytest.mark.parametrize("policy", ["lockstep/fewest", "best", "random/none/quick"])
def test_an_unknown_policy_is_refused(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With those that there are."""
    with pytest.raises(SystemExit):
        main(["simulate", "--policy", policy])
    assert policy in capsys.readouterr().err


def test_every_setting_has_a_plausible_fleet() -> None:
    """Names tell the topology: 4p2d8 is four prefill and two decode servers of eight ranks."""
    for name, setting in SETTINGS.items():
        fleet = setting.fleet
        assert name.startswith(f"{fleet.prefill}p{fleet.decode}d{fleet.ranks}-")
