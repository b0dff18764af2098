"""Test ``dp-extproc load``: compare running routers with real requests."""

from collections.abc import Iterator

import pytest

from dp_extproc.cli import main
from dp_extproc.fleet.discovery.answers import Address, Answer
from dp_extproc.lab.demo.load_command import each_engine
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config

_FAST = ("--dp-attention", "--time-scale", "0.1")


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, EngineProcess]]:
    with EngineProcess("prefill", 2, *_FAST) as prefill, EngineProcess("decode", 2, *_FAST) as decode:
        yield {"prefill 1": prefill, "decode 1": decode}


@pytest.fixture(scope="module")
def router(engines: dict[str, EngineProcess]) -> Iterator[str]:
    """Run a router in front of the engines, and yield its URL."""
    pool = {
        "models": ["*"],
        "prefill": {"endpoints": [engines["prefill 1"].url]},
        "decode": {"endpoints": [engines["decode 1"].url]},
    }
    with ServiceProcess(write_config([pool])) as service, EnvoyProcess(service.config) as envoy:
        service.wait_until_fresh()
        service.wait_until_ready()
        yield envoy.url


def _engine_options(engines: dict[str, EngineProcess]) -> list[str]:
    return [option for name, engine in engines.items() for option in ("--engine", f"{name}={engine.url}")]


def _rows(printed: str, label: str) -> list[str]:
    return [line for line in printed.splitlines() if label in line]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_load_compares_two_routers(
    engines: dict[str, EngineProcess], router: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both get every request once, in halves and in turns; the ranks got as many, without the warm-up."""
    routers = ["--router", f"one={router}", "--router", f"other={router}"]
    status = main(["load", *routers, *_engine_options(engines), "--requests", "20", "--concurrency", "4"])
    printed = capsys.readouterr().out

    assert status == 0
    assert [line for line in printed.splitlines() if " of 4: " in line] == [
        "1 of 4: one, 10 requests",
        "2 of 4: other, 10 requests",
        "3 of 4: other, 10 requests",
        "4 of 4: one, 10 requests",
    ]
    for engine in engines:
        start = next(number for number, line in enumerate(printed.splitlines()) if f"│ {engine}" in line)
        ranks = [_cells(line) for line in printed.splitlines()[start : start + 2]]
        assert [sum(int(rank[column]) for rank in ranks) for column in (2, 5)] == [20, 20]
    assert _cells(_rows(printed, "failed requests")[0])[1:] == ["0", "0"]
    assert len(_cells(_rows(printed, "time per output token of long requests")[0])) == 3
    assert "Sent in halves, in the order: one, other, other, one." in " ".join(printed.split())


def test_load_measures_one_router_without_engines(router: str, capsys: pytest.CaptureFixture[str]) -> None:
    """There is one column, and no table of ranks."""
    status = main(["load", "--router", router, "--requests", "6", "--concurrency", "3"])
    printed = capsys.readouterr().out

    assert status == 0
    assert "1 of 1" in printed
    assert "What each rank got" not in printed
    assert len(_cells(_rows(printed, "time to first token, mean")[0])) == 2


def test_load_fails_if_a_router_answers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The message has its name, its address and the reason."""
    url = f"http://127.0.0.1:{free_port()}"

    assert main(["load", "--router", f"mine={url}"]) == 1
    assert f"mine at {url} answers no request" in " ".join(capsys.readouterr().out.split())


def test_load_counts_failed_samples_and_requests(
    engines: dict[str, EngineProcess], router: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is listed with its reason; the rest is printed as ever."""
    engines["prefill 1"].fault(loads="500")
    engines["decode 1"].fault(loads="garbage", inference={"kind": "fail", "after": 60})
    try:
        options = [*_engine_options(engines), "--requests", "12", "--concurrency", "4"]
        status = main(["load", "--router", f"mine={router}", *options])
    finally:
        for engine in engines.values():
            engine.heal()
    printed = capsys.readouterr().out
    printed_text = " ".join(printed.split())
    failed = int(_cells(_rows(printed, "failed requests")[0])[1])

    assert status == 0
    assert 0 < failed < 12
    assert f"mine: {failed} requests failed; the times are of the others. " in printed_text
    assert "looks at the load of prefill 1 failed: /v1/loads answers 500" in printed_text
    assert "looks at the load of decode 1 failed: ReaderError: /v1/loads is not JSON" in printed_text


@pytest.mark.parametrize("text", ["mine", "mine=", "=http://a", "mine=ftp://a", "mine=http://"])
def test_load_refuses_a_router_without_name_and_url(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has an example."""
    with pytest.raises(SystemExit):
        main(["load", "--router", text])
    assert "NAME=URL" in capsys.readouterr().err


def look_up(name: str, port: int) -> Answer:
    """Give the name ``many`` two addresses, ``one`` one, and no other any."""
    addresses = {"many": ("fd00::2", "fd00::1"), "one": ("10.0.0.1",)}
    if name not in addresses:
        raise OSError(name)
    return Answer(tuple(Address(each, port) for each in addresses[name]))


def test_load_watches_every_engine_behind_a_name() -> None:
    """A service of docker compose has one name for all its containers."""
    given = [("prefill", "http://many:30000"), ("decode 1", "http://one:30001"), ("decode 2", "http://none:30002")]
    assert list(each_engine(given, look_up)) == [
        ("prefill 1", "http://[fd00::1]:30000"),
        ("prefill 2", "http://[fd00::2]:30000"),
        ("decode 1", "http://one:30001"),
        ("decode 2", "http://none:30002"),
    ]
