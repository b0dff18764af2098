"""Reloads: which files are applied, which are rejected, and what the running service does then."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dp_extproc.config import Config, ConfigFile, parse_config
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.runtime import reload
from dp_extproc.runtime.reload import Reloader, needs_restart
from patience import wait_for


def pool(*urls: str, **more: Any) -> list[dict[str, Any]]:
    return [{"models": ["*"], "workers": {"endpoints": list(urls)}, **more}]


def new_url() -> str:
    """Return the URL of an engine that does not run."""
    return f"http://127.0.0.1:{free_port()}"


def urls_of(service: ServiceProcess) -> list[str]:
    return [each["url"] for each in service.loads().get("endpoints", ())]


def reloads(service: ServiceProcess, outcome: str, count: int) -> bool:
    return f'dp_extproc_config_reloads_total{{outcome="{outcome}"}} {count}.0' in service.metrics()


CHANGES = {
    "listen": ("listen", {"grpc": "127.0.0.1:7001"}, ["listen"]),
    "body mode": ("envoy", {"body_mode": "full_duplex_streamed"}, ["envoy"]),
    "bus": ("sync", {"url": "redis://10.0.0.1:6379"}, ["sync"]),
    "supervision": ("supervision", "off", ["supervision"]),
    "retries": ("retry", {"attempts": 1}, ["retry"]),
    "unit of the books": ("load", {"prefill_step_cost_tokens": 1.0}, ["load.prefill_step_cost_tokens"]),
    "reload": ("reload", "watch", ["reload"]),
    "pools": ("pools", pool("http://127.0.0.1:2", policy={"host": "random"}), []),
    "interval": ("load", {"interval": "250ms"}, []),
    "admission": ("admission", {"max_token_ratio": 1.0}, []),
    "autoscaling": ("autoscaling", {"decode_target": 0.5}, []),
    "drain": ("drain", "1h", []),
}


@pytest.mark.parametrize(("section", "value", "expected"), CHANGES.values(), ids=CHANGES)
def test_needs_restart_names_what_a_reload_may_not_change(section: str, value: object, expected: list[str]) -> None:
    """Sections on which sockets, Envoy or other replicas depend need a restart, and the remedy says so."""
    before = {"pools": pool("http://127.0.0.1:1")}
    problems = needs_restart(
        parse_config(yaml.safe_dump(before)), parse_config(yaml.safe_dump({**before, section: value}))
    )

    assert [problem.key for problem in problems] == expected
    assert all("restart it" in problem.message for problem in problems)


@pytest.fixture
def content() -> dict[str, Any]:
    return write_config(pool(new_url()))


@pytest.fixture
def service(content: dict[str, Any]) -> Iterator[ServiceProcess]:
    with ServiceProcess(content) as service:
        wait_for(lambda: urls_of(service), 20)
        yield service


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_reloads_the_file(workers: int) -> None:
    """Every worker process polls new endpoints, and no longer those that were removed."""
    old, new = new_url(), new_url()
    content = write_config(pool(old), listen={"workers": workers})
    with ServiceProcess(content) as service:
        wait_for(lambda: service.log().count("ext_proc on") == workers, 20)
        service.write(yaml.safe_dump({**content, "pools": pool(new)}))
        service.send_signal(signal.SIGHUP)

        wait_for(lambda: service.log().count(f"configuration: new: {new}") == workers)
        wait_for(lambda: service.loads()["endpoints"][0]["failure"])
        assert urls_of(service) == [new]
        assert service.log().count(f"configuration: gone: {old}") == workers
        assert reloads(service, "applied", 1)


def test_reload_is_rejected_with_every_mistake(service: ServiceProcess, content: dict[str, Any]) -> None:
    """The configuration before stays in use. The log has every mistake, and a metric counts the rejection."""
    known = urls_of(service)
    service.write(yaml.safe_dump({**content, "load": {"interval": 1}, "pools": [{"models": ["*"]}]}))
    service.send_signal(signal.SIGHUP)
    wait_for(lambda: reloads(service, "refused", 1))

    assert urls_of(service) == known
    for key in ("load.interval", "pools[0]"):
        assert key in service.log()
    assert service.log().count("refused, the one before stays in use") == 1


def test_reload_is_rejected_if_it_needs_a_restart(service: ServiceProcess, content: dict[str, Any]) -> None:
    """One such change rejects the whole file, so no part of it is in use."""
    known = urls_of(service)
    changed = {**content, "supervision": "off", "pools": pool(new_url())}
    service.write(yaml.safe_dump(changed))
    service.send_signal(signal.SIGHUP)
    wait_for(lambda: reloads(service, "refused", 1))

    assert urls_of(service) == known
    assert "supervision: cannot change while the service runs; restart it" in service.log()


def test_reload_is_rejected_if_it_cannot_be_applied(tmp_path: Path) -> None:
    """The process continues with the whole configuration before."""
    before, after = (yaml.safe_dump({"pools": pool(new_url())}) for _ in range(2))
    path = tmp_path / "config.yaml"
    path.write_text(after)
    applied: list[str] = []
    returned = asyncio.Event()

    def apply(_config: Config, text: str) -> None:
        applied.append(text)
        if text == after:
            raise KeyError("gone")
        returned.set()

    async def story() -> dict[str, float]:
        reloader = Reloader(ConfigFile(path), before, parse_config(before), apply)
        running = asyncio.create_task(reloader.run())
        reloader.request()
        await returned.wait()
        assert not running.done()
        running.cancel()
        return {sample.labels["outcome"]: sample.value for metric in reloader.collect() for sample in metric.samples}

    assert asyncio.run(story()) == {"applied": 0, "refused": 1}
    assert applied == [after, before]


def test_watched_file_is_reloaded_when_it_changes(content: dict[str, Any]) -> None:
    """No signal is needed, and a file that is missing or wrong for a while does no harm."""
    content["reload"] = "watch"
    with ServiceProcess(content) as service:
        wait_for(lambda: urls_of(service), 20)
        service.write("pools: [")
        wait_for(lambda: reloads(service, "refused", 1))
        new = new_url()
        service.write(yaml.safe_dump({**content, "pools": pool(new)}))
        wait_for(lambda: urls_of(service) == [new])
        assert reloads(service, "applied", 1)
        assert reloads(service, "refused", 1)


class BeingWritten:
    """A source whose second reading gives a part of the text, and each later one the whole."""

    name = "file"
    can_change = True

    def __init__(self, before: str, part: str, whole: str) -> None:
        self._texts = [whole, part, before]

    def read(self) -> str:
        return self._texts.pop() if len(self._texts) > 1 else self._texts[0]


def test_watched_file_is_not_applied_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of a file may be a valid configuration, without the last engines."""
    monkeypatch.setattr(reload, "_WATCH_SECONDS", 0.01)
    urls = ("http://a:1", "http://b:1", "http://c:1")
    before, part, whole = (yaml.safe_dump({"reload": "watch", "pools": pool(*urls[:count])}) for count in (1, 2, 3))

    async def first_applied() -> str:
        applied: asyncio.Queue[str] = asyncio.Queue()
        source = BeingWritten(before, part, whole)
        running = asyncio.create_task(
            Reloader(source, before, parse_config(before), lambda _, text: applied.put_nowait(text)).run()
        )
        text = await asyncio.wait_for(applied.get(), 30)
        running.cancel()
        return text

    assert asyncio.run(first_applied()) == whole


def test_restarted_worker_process_does_not_read_a_rejected_file() -> None:
    """It gets the configuration of the others."""
    with ServiceProcess(write_config(pool(new_url()), listen={"workers": 2})) as service:
        wait_for(lambda: service.log().count("ext_proc on") == 2, 20)  # one that dies before would say it only once
        wait_for(lambda: urls_of(service), 20)
        pids = [each["pid"] for each in service.loads()["worker_processes"]]
        service.write("pools: [")
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: [each["restarts"] for each in service.loads()["worker_processes"]] == [1, 0], 20)
        wait_for(lambda: service.log().count("ext_proc on") == 3, 20)
        assert [each["pid"] for each in service.loads()["worker_processes"]][1] == pids[1]
