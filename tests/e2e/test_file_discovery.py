"""Engines that another program lists in files, through real Envoy."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import FAST
from e2e.steady_load import LATE, Departures, steady_load
from patience import wait_for

REPLACEMENTS = 20
DRAINS = "drains: it is no longer listed"


@dataclass
class Listed:
    """Two pairs of engines, and a file for each role."""

    pairs: Sequence[tuple[EngineProcess, EngineProcess]]
    directory: Path
    service: ServiceProcess
    envoy: EnvoyProcess

    def write(self, *pairs: int) -> None:
        """Replace both files, each of which is whole at any moment."""
        write_files(self.directory, [self.pairs[index] for index in pairs])

    def has_drained(self, count: int) -> bool:
        """Return whether so many endpoints have left until now."""
        return self.service.log().count(DRAINS) == count


def write_files(directory: Path, pairs: Sequence[tuple[EngineProcess, EngineProcess]]) -> None:
    for role, engines in zip(("prefill", "decode"), zip(*pairs, strict=True), strict=True):
        new = directory / f"{role}.new"
        new.write_text(yaml.safe_dump([engine.url for engine in engines]), encoding="utf-8")
        new.replace(directory / f"{role}.yaml")


@contextmanager
def listed(directory: Path) -> Iterator[Listed]:
    with ExitStack() as running:
        flags = ("--dp-attention", *FAST)
        pairs = [(EngineProcess("prefill", 2, *flags), EngineProcess("decode", 2, *flags)) for _ in range(2)]
        for engine in (*pairs[0], *pairs[1]):
            running.push(engine)
            engine.start()
        for engine in (*pairs[0], *pairs[1]):
            engine.wait_until_listening()
        write_files(directory, pairs[:1])
        pool = {
            "models": ["*"],
            "prefill": {"file": {"path": str(directory / "prefill.yaml")}},
            "decode": {"file": {"path": str(directory / "decode.yaml")}},
        }
        service = running.enter_context(ServiceProcess(write_config([pool])))
        envoy = running.enter_context(EnvoyProcess(service.config))
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Listed(pairs, directory, service, envoy)
        service.wait_until_idle()


def test_no_request_fails_while_files_replace_the_whole_fleet(tmp_path: Path) -> None:
    """Each time one pair replaces the other, and is not picked any more soon after."""
    with listed(tmp_path) as fleet:
        departures, delays = Departures(), []
        with steady_load(fleet.envoy.url) as load:
            for number in range(REPLACEMENTS):
                old, new = number % 2, (number + 1) % 2
                departures.returned(*fleet.pairs[new])
                written = time.monotonic()
                fleet.write(new)
                wait_for(partial(fleet.has_drained, 2 * (number + 1)), 30.0)
                delays.append(time.monotonic() - written)
                departures.left(*fleet.pairs[old])
                load.go_on(LATE + 0.3)
        load.check()
        departures.check()
        log = fleet.service.log()

    assert departures.count == 2 * REPLACEMENTS
    assert min(delays) < LATE  # all of them are, unless the machine is busy with other work
    assert log.count("gets requests from now on") == 2 * REPLACEMENTS + 2


def test_file_with_a_mistake_keeps_the_engines_and_is_logged_once(tmp_path: Path) -> None:
    """Its correction is logged, too."""
    with listed(tmp_path) as fleet:
        with steady_load(fleet.envoy.url) as load:
            (tmp_path / "decode.yaml").write_text("- http://127.0.0.1", encoding="utf-8")
            wait_for(lambda: "[0].url: name the engine's port" in fleet.service.log())
            load.go_on(1.0)
            metrics, page = fleet.service.metrics(), fleet.service.loads()
            fleet.write(0)
            wait_for(lambda: "decode.yaml reports again" in fleet.service.log())
        load.check()
        assert fleet.service.log().count("fails, and its last endpoints stay") == 1

    assert 'dp_extproc_endpoints{pool="*",role="decode",source="file",state="ready"} 1.0' in metrics
    name = f'name="file {tmp_path}/decode.yaml"'
    (age,) = re.findall(rf"^dp_extproc_source_age_seconds{{{name},.*}} (.*)$", metrics, re.MULTILINE)
    assert float(age) > 0
    assert [each["failure"] is None for each in page["sources"]] == [True, False]
    assert [each["source"] for each in page["endpoints"]] == ["file", "file"]
