"""Files for dynamic delivery can be replaced while streams are in flight."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from threading import Event
from typing import Any, Final

import pytest
import yaml

from dp_extproc.config import Config
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats import xds
from dp_extproc.envoy_config.formats.target import Target
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from e2e.stack import FAST
from faults.fleet import Fleet, Outcome, ask, run_fleet
from patience import wait_for

CHAT: Final = "/v1/chat/completions"
DRAIN_SECONDS: Final = 1


def files_of(config: Config, **changes: Any) -> dict[str, str]:
    """Print the files of a configuration with other settings of Envoy."""
    changed = config.model_copy(update={"envoy": config.envoy.model_copy(update=changes)})
    return dict(FORMS["xds"].files(changed, Target()))


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    def in_front(config: Config) -> EnvoyProcess:
        files = files_of(config)
        drain = ("--drain-time-s", str(DRAIN_SECONDS))
        return EnvoyProcess(config, bootstrap=files.pop(xds.BOOTSTRAP), files=files, options=drain)

    with run_fleet(FAST, in_front=in_front) as fleet:
        yield fleet


def listeners_of(fleet: Fleet) -> set[str]:
    page = loopback.CLIENT.get(f"{fleet.envoy.admin_url}/listeners").raise_for_status().text
    return {line.partition("::")[0] for line in page.splitlines()}


def test_files_are_what_envoy_runs(fleet: Fleet) -> None:
    """Every resource of the files is active, and Envoy has rejected none."""
    files = files_of(fleet.service.config)
    dump = loopback.CLIENT.get(f"{fleet.envoy.admin_url}/config_dump").raise_for_status().json()["configs"]
    clusters = {each["cluster"]["name"] for part in dump for each in part.get("dynamic_active_clusters", ())}

    assert listeners_of(fleet) == {each["name"] for each in yaml.safe_load(files[xds.LISTENERS])["resources"]}
    assert clusters == {each["name"] for each in yaml.safe_load(files[xds.CLUSTERS])["resources"]}
    rejected = loopback.CLIENT.get(f"{fleet.envoy.admin_url}/stats", params={"filter": "update_rejected"}).text
    assert {line.rpartition(" ")[2] for line in rejected.splitlines()} == {"0"}


@pytest.mark.parametrize("keep", [True, False], ids=["old listeners kept", "old listeners removed"])
@pytest.mark.parametrize("slow", ["prefill", "decode"])
def test_streams_outlast_a_change_if_old_listeners_are_kept(fleet: Fleet, slow: str, keep: bool) -> None:
    """Without them, what is in flight when the drain time is over is lost or repeated. New requests never fail."""
    config = fleet.service.config
    before, after = (block_of(config, size) for size in ((2, 3) if keep else (4, 5)))
    fleet.envoy.replace(before)
    wait_until_used(fleet, before)
    for engine in fleet.prefills if slow == "prefill" else fleet.decodes:
        engine.fault(inference={"kind": "slow", "after": int(slow == "decode"), "seconds": 60})
    begun, logged = Event(), len(fleet.envoy.access_log())

    asked = fleet.threads.submit(ask, fleet.client, CHAT, stream=True, on_first=begun.set)
    wait_for(begun.is_set if slow == "decode" else fleet.running)
    fleet.envoy.replace(xds.keep(before, after) if keep else after)
    wait_until_used(fleet, after)
    others: list[Future[Outcome]] = [fleet.threads.submit(ask, fleet.client, CHAT, stream=False) for _ in range(8)]
    wait_for(lambda: fleet.stat("listener_manager.total_listeners_draining") == 0)  # the drain time is over
    for engine in fleet.engines:
        engine.heal()

    outcome = asked.result()
    assert [str(each.result()) for each in others] == ["answer"] * len(others)
    legs = wait_for(
        lambda: fleet.envoy.access_log()[logged + 2 * len(others) + 1 :] and fleet.envoy.access_log()[logged:]
    )
    ends = [(leg["leg"], leg["status"], leg["response_flags"]) for leg in legs]
    cut = [(leg, status, flags) for leg, status, flags in ends if status != 200 or flags != "-"]
    assert (outcome.complete and not cut) is keep, (outcome, cut)
    fleet.envoy.replace(after)
    wait_for(lambda: listeners_of(fleet) == names(after))
    fleet.settle()


def block_of(config: Config, mebibytes: int) -> dict[str, str]:
    """Print a block with another limit, which every listener and cluster has. The front door stays as it is."""
    files = files_of(config, max_body_bytes=mebibytes << 20)
    (front_door, *_), (_, *block) = resources(files_of(config)), resources(files)
    listeners = yaml.safe_dump({"resources": [front_door, *block]})
    return {xds.CLUSTERS: files[xds.CLUSTERS], xds.LISTENERS: listeners, xds.ROUTES: files[xds.ROUTES]}


def wait_until_used(fleet: Fleet, files: Mapping[str, str]) -> None:
    """Wait until Envoy has the listeners of *files*, and sends requests to the block there."""
    cluster = yaml.safe_load(files[xds.ROUTES])["resources"][0]["virtual_hosts"][0]["routes"][0]["route"]["cluster"]
    wait_for(lambda: names(files) <= listeners_of(fleet))
    wait_for(lambda: f'"{cluster}"' in routes_of(fleet))


def routes_of(fleet: Fleet) -> str:
    parameters = {"resource": "dynamic_route_configs"}
    return loopback.CLIENT.get(f"{fleet.envoy.admin_url}/config_dump", params=parameters).raise_for_status().text


def names(files: Mapping[str, str]) -> set[str]:
    return {each["name"] for each in resources(files)}


def resources(files: Mapping[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(files[xds.LISTENERS])["resources"]
    return found
