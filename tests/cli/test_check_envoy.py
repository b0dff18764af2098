"""``dp-extproc check --envoy`` prints what is missing or wrong in an Envoy, and its status tells a script."""

import argparse
import json
from pathlib import Path

import pytest
import yaml

from dp_extproc.cli import check
from envoy_check.samples import EXAMPLES, bootstrap_of, example_config, manager, route


def run(*options: str | Path) -> int:
    """Run the command on the example configuration, whose engines do not exist."""
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.run(parser.parse_args(["-c", str(EXAMPLES / "dp-extproc.yaml"), *map(str, options)]))


def test_printed_configuration_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0, and one line with what was read."""
    assert run("--envoy", EXAMPLES / "envoy.yaml", "--no-engines") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{EXAMPLES / 'envoy.yaml'}: 4 listeners, 7 clusters",
        "the configuration of Envoy can be used",
    ]


def test_findings_have_place_effect_and_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error makes the status 1. One finding at several places is printed once."""
    bootstrap = bootstrap_of(example_config())
    route(bootstrap)["route"].pop("timeout")
    for name in ("inference", "dp_dispatch"):
        manager(bootstrap, name).pop("delayed_close_timeout")
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(bootstrap), encoding="utf-8")

    assert run("--no-engines", "--envoy", path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "route_timeout: listener inference, virtual host all, route all",
        "  what happens: responses end after 15 s",
        "  remedy: set timeout: 0s on the route",
    ]
    assert lines[-1] == "1 error in the configuration of Envoy"


def test_warnings_alone_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are printed, and the status is 0."""
    bootstrap = bootstrap_of(example_config())
    manager(bootstrap).pop("delayed_close_timeout")
    path = tmp_path / "envoy.yaml"
    path.write_text(yaml.safe_dump(bootstrap), encoding="utf-8")

    assert run("--no-engines", "--envoy", path) == 0
    assert "delayed_close: " in capsys.readouterr().out


def test_unreadable_envoy_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and nothing on standard output can be taken for a result."""
    assert run("--no-engines", "--envoy", tmp_path / "none.json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{tmp_path}/none.json: cannot be read: No such file or directory\n"


def test_engines_are_checked_before_envoy(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --no-engines both are checked, and either can fail."""
    assert run("--envoy", EXAMPLES / "envoy.yaml") == 1
    out = capsys.readouterr().out
    assert out.index("engines cannot be used") < out.index("the configuration of Envoy can be used")


def test_nothing_to_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """--no-engines alone would pass without a look at anything."""
    assert run("--no-engines") == 2
    assert "add --envoy" in capsys.readouterr().err
