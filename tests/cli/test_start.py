"""What ``serve``, ``check`` and ``envoy-config`` start from: a file, standard input, options or variables."""

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dp_extproc.cli.start import Start, add_arguments, load
from dp_extproc.config import ConfigError, parse_config

FILE = "pools: [{models: [in-file], workers: {endpoints: ['http://f:1']}}]\n"


def started(line: str, environment: Mapping[str, str] = {}, warnings: list[str] | None = None) -> Start:
    """Load what a command line and the variables after ``DP_EXTPROC_`` name; without *warnings* there are none."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    warned: list[str] = []
    given = {f"DP_EXTPROC_{name}": value for name, value in environment.items()}
    found = load(parser.parse_args(line.split()), warned.append, given)
    if warnings is None:
        assert warned == []
    else:
        warnings += warned
    return found


def problems_of(line: str, environment: Mapping[str, str] = {}) -> list[str]:
    with pytest.raises(ConfigError) as failed:
        started(line, environment, [])
    return [str(problem) for problem in failed.value.problems]


PAIR = """\
listen: {grpc: 0.0.0.0:7002, admin: 127.0.0.1:7090}
envoy: {inference: 0.0.0.0:80}
pools:
- models: [m, n]
  prefill: {endpoints: ["http://a:1", "http://b:1"]}
  decode: {endpoints: ["http://c:1"], dns: [{name: d.example., port: 2}, {name: _http._tcp.e, type: srv}]}
"""
ADDRESSES = {"LISTEN": "0.0.0.0:7002", "ADMIN": "127.0.0.1:7090", "ENVOY_LISTEN": "0.0.0.0:80"}
EQUAL: dict[str, tuple[str, Mapping[str, str]]] = {
    "options": (
        (
            "--prefill http://a:1 http://b:1 --model m n --decode http://c:1 dns://d.example.:2 --listen 0.0.0.0:7002 "
            "--decode dns://_http._tcp.e --admin 127.0.0.1:7090 --envoy-listen 0.0.0.0:80"
        ),
        {},
    ),
    "variables": (
        "",
        {
            "PREFILL": " http://a:1, http://b:1,",
            "DECODE": "http://c:1\ndns://d.example.:2 dns://_http._tcp.e",
            "MODEL": "m,n",
            **ADDRESSES,
        },
    ),
    "options over variables": (
        "--prefill http://a:1 --prefill http://b:1 --model m n",
        {
            "PREFILL": "http://x:1",
            "MODEL": "x",
            "DECODE": "http://c:1 dns://d.example.:2 dns://_http._tcp.e",
            **ADDRESSES,
        },
    ),
}


@pytest.mark.parametrize(("line", "environment"), EQUAL.values(), ids=EQUAL)
def test_options_and_variables_give_the_configuration_of_a_file(line: str, environment: Mapping[str, str]) -> None:
    """A start without a file is a file that nobody has to write; the text of it reads the same again."""
    start = started(line, environment)

    assert start.config == parse_config(PAIR)
    assert parse_config(start.text) == start.config
    assert not start.source.can_change
    assert start.source.read() == start.text


def test_workers_option_gives_an_aggregated_pool_for_any_model() -> None:
    """The model is the only other thing that a pool needs."""
    assert started("--workers http://a:1").config == parse_config(FILE.replace("in-file", "'*'").replace("//f", "//a"))


def test_value_of_an_option_is_no_reference_to_a_variable() -> None:
    """The shell has expanded what it had to."""
    start = started("--workers http://a:1 --model ${PATH} $${x}")

    assert start.config.pools[0].models == ("${PATH}", "$${x}")


@pytest.mark.parametrize("command", ["--processes 3", "--workers http://a:1 --processes 3"])
def test_processes_option_counts_with_and_without_a_file(tmp_path: Path, command: str) -> None:
    """Envoy is configured for as many, so both commands take the option."""
    path = tmp_path / "c.yaml"
    path.write_text(FILE)
    warnings: list[str] = []
    is_file = "http" not in command
    start = started(f"-c {path} {command}" if is_file else command, {}, warnings)

    assert start.listen.workers == 3
    assert start.config.listen.workers == (1 if is_file else 3)
    assert len(warnings) == is_file


def test_number_after_workers_is_read_as_processes_with_a_warning(tmp_path: Path) -> None:
    """It was the meaning of the option before it took URLs."""
    path = tmp_path / "c.yaml"
    path.write_text(FILE + "listen: {workers: 4}\n")
    warnings: list[str] = []

    assert started(f"--workers 4 -c {path}", {}, warnings).listen.workers == 4
    assert warnings == ["--workers 4: was renamed; write --processes 4 (the old name is read until version 1.0)"]
    assert problems_of(f"--workers 4 --processes 4 -c {path}") == [
        "--workers 4: a number is the old name of --processes, which is given, too; keep --processes alone"
    ]


UNUSED = {
    "variables beside an option for the file": (
        "-c FILE",
        {"PREFILL": "http://a:1"},
        ["DP_EXTPROC_PREFILL"],
        "in-file",
    ),
    "variable of the file beside URLs": ("--workers http://a:1", {"CONFIG": "/nowhere"}, ["DP_EXTPROC_CONFIG"], "*"),
    "variable of the file alone": ("", {"CONFIG": "FILE"}, [], "in-file"),
    "option over the variable of the file": ("-c FILE", {"CONFIG": "/nowhere"}, [], "in-file"),
}


@pytest.mark.parametrize(("line", "environment", "unused", "model"), UNUSED.values(), ids=UNUSED)
def test_option_wins_over_variables_of_the_other_way(
    tmp_path: Path, line: str, environment: Mapping[str, str], unused: list[str], model: str
) -> None:
    """A variable that is not used is mentioned, because it may be a mistake."""
    path = tmp_path / "c.yaml"
    path.write_text(FILE)
    warnings: list[str] = []
    given = {name: value.replace("FILE", str(path)) for name, value in environment.items()}

    assert started(line.replace("FILE", str(path)), given, warnings).config.pools[0].models == (model,)
    assert [warning.partition(" is not used")[0] for warning in warnings] == unused


CONFLICTS: dict[str, tuple[str, Mapping[str, str], list[str]]] = {
    "nothing": ("", {}, ["is missing; give one of\n    -c FILE"]),
    "addresses alone": ("--listen 127.0.0.1:1", {}, ["is missing; give one of\n    -c FILE"]),
    "file and URLs": (
        "-c x --prefill http://a:1",
        {},
        ["--prefill: is for a start without a file, and --config names"],
    ),
    "file and model": ("-c x --model m", {}, ["--model: is for a start without a file"]),
    "variables of both": (
        "",
        {"CONFIG": "x", "WORKERS": "http://a:1"},
        ["DP_EXTPROC_WORKERS: is for a start without a file, and DP_EXTPROC_CONFIG names"],
    ),
    "prefill alone": ("--prefill http://a:1", {}, ["--prefill: give --prefill and --decode, or --workers alone"]),
    "all roles": (
        "--workers http://a:1 --prefill http://b:1",
        {"DECODE": "http://c:1"},
        ["--prefill, DP_EXTPROC_DECODE, --workers: give --prefill and --decode"],
    ),
    "wrong values": (
        "--prefill http://a:1 10.0.0.1:30000 --decode http://user:hunter2@b:1 --listen localhost:9002",
        {"ADMIN": "9090"},
        [
            "--prefill 10.0.0.1:30000: write the engine's address as http://host:port",
            "--decode b:1: write the engine's address as http://host:port",
            "--listen: write an IP address and a port",
            "DP_EXTPROC_ADMIN: write an IP address and a port",
        ],
    ),
    "one engine in two roles": (
        "--prefill http://a:1 http://b:1",
        {"DECODE": "http://b:1"},
        ["DP_EXTPROC_DECODE http://b:1: http://b:1 is in --prefill http://b:1 and in DP_EXTPROC_DECODE http://b:1"],
    ),
    "DNS name without port": ("--workers dns://engines", {}, ["--workers dns://engines: name the port"]),
    "SRV records with a port": (
        "--workers dns://_http._tcp.a:1",
        {},
        ["--workers dns://_http._tcp.a:1: SRV records have ports; leave port out"],
    ),
    "DNS name with a path": ("--workers dns://a:1/b", {}, ["--workers dns://a:1/b: write the engine's address"]),
    "processes without ports": (
        "--workers http://a:1 --listen 127.0.0.1:9089 --processes 2",
        {},
        ["--processes: 2 workers take the ports 9089-9090; put admin on another one"],
    ),
}


@pytest.mark.parametrize(("line", "environment", "expected"), CONFLICTS.values(), ids=CONFLICTS)
def test_mistake_is_reported_by_the_name_of_its_option_or_variable(
    line: str, environment: Mapping[str, str], expected: list[str]
) -> None:
    """There is no line of a file, and no key that the operator has written."""
    found = problems_of(line, environment)

    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True))
    assert "hunter2" not in str(found)
    assert "pools[" not in str(found)


def _envoy_config(text: bytes) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "dp_extproc", "envoy-config", "-c", "-"]
    return subprocess.run(argv, input=text, capture_output=True, timeout=60, check=False)


def test_standard_input_is_read_as_the_configuration() -> None:
    """Problems have the lines of what was piped."""
    good, wrong, unreadable = (_envoy_config(text) for text in (FILE.encode(), b"\npools: []\n", b"\xff"))

    assert (good.returncode, good.stderr) == (0, b"")
    assert b"ext_proc" in good.stdout
    assert wrong.returncode == unreadable.returncode == 2
    assert wrong.stderr == b"standard input: 1 problem(s)\n  line 2, pools: is empty; name at least one\n"
    assert unreadable.stderr.startswith(b"standard input: 1 problem(s)\n  cannot be read: ")
