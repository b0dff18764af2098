"""Test ``dp-extproc simulate``: a table for a given fleet and trace."""

import json
from pathlib import Path

import pytest

from dp_extproc.cli import main
from dp_extproc.lab.simulate.settings import SETTINGS
from dp_extproc.lab.workload.generate import make_trace
from dp_extproc.lab.workload.trace import write_trace


def test_simulate_prints_a_row_for_each_placement_of_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are written as JSON, too."""
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


def test_simulate_prints_tpot_of_short_and_long_requests_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table and numbers have the time per output token with its gains; there is none for prefill alone."""
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


def test_options_change_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """Replicas with and without sync are two surroundings."""
    small = ["--setting", "4p2d8-agent", "--requests", "60", "--prefill", "2", "--ranks", "2", "--rate", "4"]
    statuses = [main(["simulate", *small, "--seeds", "1", "--replicas", "2", *sync]) for sync in ([], ["--sync", "20"])]

    assert statuses == [0, 0]
    assert "4p2d8-agent" in capsys.readouterr().out


def test_simulate_names_every_bad_line_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All bad lines are named at once."""
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival": 0, "prompt_tokens": 5, "output_tokens": 1}\n{"arrival": -1}\nnonsense\n', encoding="utf-8"
    )

    assert main(["simulate", "--trace", str(path)]) == 2
    open_peer = capsys.readouterr().err
    assert "line 2" in open_peer
    assert "line 3" in open_peer


@pytest.mark.parametrize("policy", ["lockstep/fewest", "best", "random/none/quick"])
def test_simulate_refuses_an_unknown_policy(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has all policies."""
    with pytest.raises(SystemExit):
        main(["simulate", "--policy", policy])
    assert policy in capsys.readouterr().err


def test_settings_have_the_fleet_of_their_name() -> None:
    """The name has the topology: 4p2d8 is four prefill and two decode engines of 8 ranks, 2w4 two aggregated ones."""
    for name, setting in SETTINGS.items():
        fleet = setting.fleet
        roles = f"{fleet.prefill}p{fleet.decode}d" if fleet.prefill else f"{fleet.decode}w"
        assert name.startswith(f"{roles}{fleet.ranks}-")
        assert fleet.lockstep is ("-plain" not in name)
