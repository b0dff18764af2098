"""Files for dynamic delivery can be replaced while streams are in flight."""

import re
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from threading import Event
from typing import Any, Final

import pytest
import yaml

from dp_extproc.cli import rollout
from dp_extproc.config import Config, parse_config
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats import xds
from dp_extproc.envoy_config.formats.target import Target
from dp_extproc.envoy_config.front_door import CORS_FILTER
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
    deliver(fleet, before)
    for engine in fleet.prefills if slow == "prefill" else fleet.decodes:
        engine.fault(inference={"kind": "slow", "after": int(slow == "decode"), "seconds": 60})
    begun, logged = Event(), len(fleet.envoy.access_log())

    asked = fleet.threads.submit(ask, fleet.client, CHAT, stream=True, on_first=begun.set)
    wait_for(begun.is_set if slow == "decode" else fleet.running)
    deliver(fleet, after, keep=keep)
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
    deliver(fleet, after)
    wait_for(lambda: listeners_of(fleet) == names(after))
    fleet.settle()


def test_no_request_fails_while_envoy_checks_the_new_service(fleet: Fleet) -> None:
    """The routes follow when the new block can be used. A standby that does not answer delays that by a second."""
    config = fleet.service.config
    with socket.create_server(("127.0.0.1", 0)) as silent:
        standby = f"127.0.0.1:{silent.getsockname()[1]}"
        after = block_of(config, 6, standby=(standby,))
        done = Event()

        def ask_until_done() -> set[str]:
            seen = set[str]()
            while not done.is_set():
                seen.add(str(ask(fleet.client, CHAT, stream=False)))
            return seen

        clients = [fleet.threads.submit(ask_until_done) for _ in range(3)]
        deliver(fleet, after)
        last = [ask(fleet.client, CHAT, stream=False) for _ in range(8)]
        done.set()

        assert set().union(*(each.result() for each in clients)) == {"answer"}
        assert {str(each) for each in last} == {"answer"}
        wait_for(lambda: listeners_of(fleet) == names(after))
        fleet.settle()


def test_routes_stay_if_envoy_refuses_the_new_block(fleet: Fleet) -> None:
    """The message names what is missing. Requests still go to the old block."""
    directory, config = fleet.envoy.directory, fleet.service.config
    names_of_files = (xds.CLUSTERS, xds.LISTENERS, xds.ROUTES)
    before = {name: (directory / name).read_text(encoding="utf-8") for name in names_of_files}
    refused = block_of(config, 7)
    refused[xds.LISTENERS] = re.sub(r"(\w+-decode)$", r"\1-that-is-missing", refused[xds.LISTENERS], flags=re.MULTILINE)

    with pytest.raises(TimeoutError, match="dp_dispatch"):
        deliver(fleet, refused, patience=1)

    assert (directory / xds.ROUTES).read_text(encoding="utf-8") == before[xds.ROUTES]
    assert ask(fleet.client, CHAT, stream=False).complete
    deliver(fleet, before)
    wait_for(lambda: listeners_of(fleet) == names(before))


@pytest.mark.parametrize("prefix", ["", "llm_"])
def test_front_door_of_the_files_has_all_that_it_names(prefix: str) -> None:
    """The page policy of CORS and all collectors are there, although the block has names of its own."""
    settings = {
        "name_prefix": prefix,
        "cors": {"allow_origins": ["https://chat.test"]},
        "tracing": {"collector": "127.0.0.1:4317"},
        "access_log": {"grpc": "127.0.0.1:4318", "otel": "127.0.0.1:4319"},
    }
    pools = [{"models": ["*"], "workers": {"endpoints": ["http://x:1"]}}]
    files = FORMS["xds"].files(parse_config(yaml.safe_dump({"envoy": settings, "pools": pools})), Target())

    (routes,) = yaml.safe_load(files[xds.ROUTES])["resources"]
    assert CORS_FILTER in routes["virtual_hosts"][0]["typed_per_filter_config"]
    used = set(re.findall(r"(?:cluster_name|cluster): (\S+)", files[xds.LISTENERS] + files[xds.ROUTES]))
    assert used <= set(xds.names(xds.CLUSTERS, files[xds.CLUSTERS]))
    assert {f"{prefix}{name}" for name in ("trace_collector", "log_collector_grpc", "log_collector_otel")} <= used


def block_of(config: Config, mebibytes: int, **changes: Any) -> dict[str, str]:
    """Print a block with another limit, which every listener and cluster has. The front door stays as it is."""
    files = files_of(config, max_body_bytes=mebibytes << 20, **changes)
    (front_door, *_), (_, *block) = resources(files_of(config)), resources(files)
    listeners = yaml.safe_dump({"resources": [front_door, *block]})
    return {xds.CLUSTERS: files[xds.CLUSTERS], xds.LISTENERS: listeners, xds.ROUTES: files[xds.ROUTES]}


def deliver(fleet: Fleet, files: Mapping[str, str], *, keep: bool = False, patience: float = 10) -> None:
    """Write the files as the command does, which waits for Envoy, and has nothing to remark."""
    notes: list[str] = []
    admin = fleet.service.config.envoy.admin
    rollout.replace_block(fleet.envoy.directory, files, admin, notes.append, keep=keep, patience=patience)
    assert notes == []


def names(files: Mapping[str, str]) -> set[str]:
    return {each["name"] for each in resources(files)}


def resources(files: Mapping[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(files[xds.LISTENERS])["resources"]
    return found
