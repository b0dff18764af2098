"""Reading the file anew: what is taken, what is refused, and what the running service makes of it."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dp_extproc.config import Config, parse_config
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.runtime.reload import Reloader, cannot_change
from patience import wait_for


def pool(*urls: str, **more: Any) -> list[dict[str, Any]]:
    return [{"models": ["*"], "workers": {"endpoints": list(urls)}, **more}]


def new_url() -> str:
    """Name an engine that nobody has started."""
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
    "drain": ("drain", "1h", []),
}


@pytest.mark.parametrize(("section", "value", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_a_running_service_can_change(section: str, value: object, expected: list[str]) -> None:
    """Sections that sockets, Envoy or other replicas depend on need a restart, and the remedy says so."""
    before = {"pools": pool("http://127.0.0.1:1")}
    problems = cannot_change(
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
def test_a_signal_has_the_file_read_anew(workers: int) -> None:
    """New endpoints are watched by every worker, and those that are left out are gone."""
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


def test_a_bad_file_is_refused_with_every_mistake(service: ServiceProcess, content: dict[str, Any]) -> None:
    """The configuration before stays in use; the log says all that is wrong, and a metric counts."""
    known = urls_of(service)
    service.write(yaml.safe_dump({**content, "load": {"interval": 1}, "pools": [{"models": ["*"]}]}))
    service.send_signal(signal.SIGHUP)
    wait_for(lambda: reloads(service, "refused", 1))

    assert urls_of(service) == known
    for key in ("load.interval", "pools[0]"):
        assert key in service.log()
    assert service.log().count("refused, the one before stays in use") == 1


def test_what_cannot_change_is_refused_with_the_remedy(service: ServiceProcess, content: dict[str, Any]) -> None:
    """A file with one such change is refused as a whole: nothing is half in use."""
    known = urls_of(service)
    changed = {**content, "supervision": "off", "pools": pool(new_url())}
    service.write(yaml.safe_dump(changed))
    service.send_signal(signal.SIGHUP)
    wait_for(lambda: reloads(service, "refused", 1))

    assert urls_of(service) == known
    assert "supervision: cannot change while the service runs; restart it" in service.log()


def test_a_configuration_that_cannot_be_applied_is_refused(tmp_path: Path) -> None:
    """Whatever goes wrong, the process goes on with the configuration before, all of it."""
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
        reloader = Reloader(path, before, parse_config(before), apply)
        running = asyncio.create_task(reloader.run())
        reloader.ask()
        await returned.wait()
        assert not running.done()
        running.cancel()
        return {sample.labels["outcome"]: sample.value for metric in reloader.collect() for sample in metric.samples}

    assert asyncio.run(story()) == {"applied": 0, "refused": 1}
    assert applied == [after, before]


def test_a_file_that_is_watched_is_read_when_it_changes(content: dict[str, Any]) -> None:
    """With reload: watch nobody has to say so; a file that is missing or bad for a while does no harm."""
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


def test_a_worker_that_starts_anew_does_not_meet_a_refused_file() -> None:
    """It gets what the others have."""
    with ServiceProcess(write_config(pool(new_url()), listen={"workers": 2})) as service:
        wait_for(lambda: service.log().count("ext_proc on") == 2, 20)  # one that dies before would say it only once
        wait_for(lambda: urls_of(service), 20)
        pids = [each["pid"] for each in service.loads()["worker_processes"]]
        service.write("pools: [")
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: [each["restarts"] for each in service.loads()["worker_processes"]] == [1, 0], 20)
        wait_for(lambda: service.log().count("ext_proc on") == 3, 20)
        assert [each["pid"] for each in service.loads()["worker_processes"]][1] == pids[1]
