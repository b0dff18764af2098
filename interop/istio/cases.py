"""What only Istio's gateways can show: two instances, failing closed, changes under a stream, a doubled extension."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import yaml

from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_check import Finding, Severity, audit
from dp_extproc.envoy_check.reader import read_envoy
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from faults.fleet import BODIES, Outcome, ask
from interop.istio.control_plane import ControlPlane
from interop.istio.gateways import HOST, Kind, Resource, printed, with_settings
from interop.istio.recording import delivered, differences, patches_of, record, without_ours
from interop.mesh.scenarios import CHAT
from interop.mesh.site import Site
from patience import wait_for

_SECOND_HOST: Final = "llm2.example.com"
_DIALLING: Final = ("prefill", "decode_server")
"""Clusters that dial engines. Without a mirrored prefill leg the first is not printed."""
_EXAMPLE: Final = Path(__file__).parents[2] / "envoy" / "istio-gateway-timeouts.yaml"
_PATIENCE: Final = 30.0
_STREAM_SECONDS: Final = 6
"""How long a stream of the cases lasts that change something under it."""


@dataclass(frozen=True, slots=True)
class Rig:
    """What each case gets."""

    plane: ControlPlane
    kind: Kind
    envoy: EnvoyProcess
    site: Site
    drain_seconds: int
    """Time that its Envoy gives to open streams when a listener changes."""

    def add(self, case: str, seen: str, *, good: bool) -> None:
        self.site.report.add(case, seen, good=good)


Case = Callable[[Rig], None]


def resources_are_accepted(rig: Rig, recorded: Path | None = None) -> None:
    """The printed resources reach a running gateway, and change nothing but what they name."""
    wait_for(lambda: rig.site.neighbour.get("/").status_code == httpx.codes.OK, _PATIENCE)
    before = delivered(rig.envoy.admin_url)
    rig.plane.apply(*_ours(rig))
    wait_for(lambda: _chat(rig).status_code == httpx.codes.OK, _PATIENCE)
    after = delivered(rig.envoy.admin_url)
    listeners = [each["name"] for each in after["dynamic_listeners"] if "internal_listener" in each]
    printed_ones = {each["patch"]["value"]["name"] for each in patches_of(_ours(rig)) if each["applyTo"] == "LISTENER"}
    rig.add("internal listeners", ", ".join(listeners), good=set(listeners) == printed_ones)
    rejected = rig.site.count(r"(update_rejected|update_failure)$")
    rig.add("updates that Envoy rejected", str(rejected), good=rejected == 0)
    different = differences(after, _ours(rig))
    rig.add(
        "clusters and listeners that differ from the printed ones", ", ".join(different) or "none", good=not different
    )
    kept = without_ours(after, _ours(rig))
    changed = [each["name"] for key, items in before.items() for each in items if each not in kept[key]]
    rig.add("other resources of Envoy that changed", ", ".join(changed) or "none", good=kept == before)
    found = _check(rig)
    rig.add(
        "dp-extproc check --envoy",
        ", ".join(sorted({each.code for each in found})) or "nothing",
        good=not _errors(found),
    )
    if recorded is not None:
        record(recorded / f"{rig.kind.name}.json", _ours(rig), after)


def applied_under_a_stream_of_the_neighbour(rig: Rig) -> None:
    """The first application of the resources cuts no stream of the other host, however short the drain time is."""
    for each in reversed(_ours(rig)):
        rig.plane.delete(each)
    wait_for(lambda: _chat(rig).status_code == httpx.codes.NOT_FOUND, _PATIENCE)
    began = threading.Event()
    streaming = rig.site.threads.submit(rig.site.stream_of_neighbour, _STREAM_SECONDS, began.set)
    assert began.wait(_PATIENCE)
    rig.plane.apply(*_ours(rig))
    wait_for(lambda: _chat(rig).status_code == httpx.codes.OK, _PATIENCE)
    assert not streaming.done()
    seen, case = streaming.result(), f"applied under a stream of the neighbour, drain time {rig.drain_seconds} s"
    rig.add(case, seen, good=seen == "complete")


def timeouts_are_added(rig: Rig) -> None:
    """The shipped example sets what the printed resources leave to the owner of the gateway."""
    example = yaml.safe_load(_EXAMPLE.read_text(encoding="utf-8"))
    rig.plane.apply(example)
    wait_for(lambda: "no_request_timeouts" not in {each.code for each in _check(rig)}, _PATIENCE)
    found = ", ".join(sorted({each.code for each in _check(rig)}))
    outcome = ask(rig.site.client, CHAT, stream=True)
    case = f"{_EXAMPLE.name} applied, check --envoy"
    rig.add(case, f"{found}; {outcome}", good=outcome.complete and not _errors(_check(rig)))
    rig.plane.delete(example)
    wait_for(lambda: "no_request_timeouts" in {each.code for each in _check(rig)}, _PATIENCE)


def instance_beside_another(rig: Rig) -> None:
    """Two instances with names of their own serve two hosts of one gateway."""
    config = with_settings(rig.site.fleet.config, name_prefix="second-")
    second = printed(config, rig.kind.target(_SECOND_HOST))
    rig.plane.apply(*second)
    with loopback.client(rig.site.gateway.url) as client:
        client.headers["host"] = _SECOND_HOST
        wait_for(lambda: client.get("/v1/models").status_code == httpx.codes.OK, _PATIENCE)
        outcomes = [ask(each, CHAT, stream=True) for each in (rig.site.client, client)]
        other = rig.site.neighbour.get("/").status_code
        seen = f"ours: {outcomes[0]}, second: {outcomes[1]}, neighbour: {other}"
        rig.add("second instance with --name-prefix second-", seen, good=all(each.complete for each in outcomes))
    for each in reversed(second):
        rig.plane.delete(each)
    wait_for(lambda: "second-" not in loopback.CLIENT.get(f"{rig.envoy.admin_url}/listeners").text, _PATIENCE)
    outcome = ask(rig.site.client, CHAT, stream=False)
    rig.add("second instance removed", f"ours: {outcome}", good=outcome.complete)


def filter_is_missing(rig: Rig) -> None:
    """Without the EnvoyFilter the host fails closed, and the neighbour is served."""
    (envoy_filter,) = (each for each in _ours(rig) if each["kind"] == "EnvoyFilter")
    rig.plane.delete(envoy_filter)
    wait_for(lambda: _chat(rig).status_code != httpx.codes.OK, _PATIENCE)
    answer, other = _chat(rig), rig.site.neighbour.get("/").status_code
    seen = f"{answer.status_code} {answer.text!r}; neighbour {other}"
    rig.add("EnvoyFilter deleted", seen, good=answer.status_code >= 500 and other == httpx.codes.OK)
    rig.plane.apply(envoy_filter)
    wait_for(lambda: _chat(rig).status_code == httpx.codes.OK, _PATIENCE)
    rig.add("EnvoyFilter applied again", "an answer", good=True)


def route_changes_under_a_stream(rig: Rig) -> None:
    """A change of the route cuts no stream."""
    fewer = rig.site.fleet.config.retry.model_copy(update={"attempts": 2})
    outcome = _stream_while(rig, rig.site.fleet.config.model_copy(update={"retry": fewer}), _ROUTES)
    rig.add("route changed under a stream", str(outcome), good=outcome.complete)


def clusters_change_under_a_stream(rig: Rig) -> None:
    """A change of the clusters of the service ends its ext_proc streams. With whole bodies the filter fails open."""
    config = rig.site.fleet.config
    rarer = config.listen.model_copy(update={"keepalive": 2 * config.listen.keepalive})
    outcome = _stream_while(rig, config.model_copy(update={"listen": rarer}), _CLUSTERS)
    mode = config.envoy.body_mode
    good = outcome.complete == (mode is BodyMode.BUFFERED)
    rig.add(f"clusters of the service changed under a stream, body mode {mode.value}", str(outcome), good=good)


def listener_changes_under_a_stream(rig: Rig) -> None:
    """A change of an internal listener cuts the streams that are still open when the drain time is over."""
    longer = rig.site.fleet.config.supervision.model_copy(update={"prefill_timeout": 100.0})
    outcome = _stream_while(rig, rig.site.fleet.config.model_copy(update={"supervision": longer}), _LISTENERS)
    case = f"listener changed under a stream of {_STREAM_SECONDS} s, drain time {rig.drain_seconds} s"
    rig.add(case, str(outcome), good=outcome.complete == (rig.drain_seconds > _STREAM_SECONDS))
    later = ask(rig.site.client, CHAT, stream=True)
    rig.add("the next stream", str(later), good=later.complete)


def engines_are_dialled_by_tls(rig: Rig) -> None:
    """Every cluster that dials engines has done so with the certificates of the mesh."""
    names = [name for name in _DIALLING if _is_printed(rig, name)]
    dialled = {name: rig.site.count(rf"^cluster\.{name}\.ssl\.handshake$") for name in names}
    failed = rig.site.count(r"^cluster\.(prefill|decode_server)\.ssl\.(fail_verify.*|connection_error)$")
    seen = ", ".join(f"{name} {count}" for name, count in dialled.items())
    rig.add("TLS handshakes with engines", f"{seen}; failed {failed}", good=all(dialled.values()) and not failed)


def _is_printed(rig: Rig, cluster: str) -> bool:
    return cluster in {
        each["patch"]["value"]["name"] for each in patches_of(_ours(rig)) if each["applyTo"] == "CLUSTER"
    }


def extension_is_doubled(rig: Rig) -> None:
    """With the bootstrap extension twice no request passes an internal listener, and Envoy's log is empty."""
    answer, other = _chat(rig), rig.site.neighbour.get("/").status_code
    about = [line for line in rig.envoy.log().splitlines() if "internal" in line.lower()]
    seen = f"{answer.status_code} {answer.text!r}; lines of Envoy's log about it: {len(about)}; neighbour {other}"
    rig.add("bootstrap extension twice", seen, good=answer.status_code == httpx.codes.SERVICE_UNAVAILABLE)
    errors = _errors(_check(rig))
    rig.add("dp-extproc check --envoy", ", ".join(errors), good=errors == ["extension_twice"])


CASES: Final[Sequence[Case]] = (
    instance_beside_another,
    filter_is_missing,
    route_changes_under_a_stream,
    clusters_change_under_a_stream,
    listener_changes_under_a_stream,
)
CLASSIC_CASES: Final[Sequence[Case]] = (
    timeouts_are_added,
    applied_under_a_stream_of_the_neighbour,
    listener_changes_under_a_stream,
)
"""What a gateway of Istio's API with a short drain time shows."""
_LISTENERS: Final = r"^listener_manager\.lds\.update_success$"
_CLUSTERS: Final = r"^cluster_manager\.cds\.update_success$"
_ROUTES: Final = r"^http\..*\.rds\..*\.update_success$"


def _check(rig: Rig) -> list[Finding]:
    return audit(asyncio.run(read_envoy([rig.envoy.admin_url])), rig.site.fleet.config)


def _errors(findings: Sequence[Finding]) -> list[str]:
    return sorted({each.code for each in findings if each.severity is Severity.ERROR})


def _ours(rig: Rig) -> list[Resource]:
    return printed(rig.site.fleet.config, rig.kind.target(HOST))


def _chat(rig: Rig) -> httpx.Response:
    return rig.site.client.post(CHAT, json=BODIES[CHAT])


def _stream_while(rig: Rig, config: Config, updates: str) -> Outcome:
    """Stream while the printed resources become those of another configuration, and back again."""
    changed = printed(config, rig.kind.target(HOST))
    for engine in rig.site.fleet.decodes:
        engine.fault(inference={"kind": "slow", "after": 1, "seconds": _STREAM_SECONDS})
    before = rig.site.count(updates)
    began = threading.Event()
    streaming = rig.site.threads.submit(ask, rig.site.client, CHAT, stream=True, on_first=began.set)
    assert began.wait(_PATIENCE)
    rig.plane.apply(*changed)
    wait_for(lambda: rig.site.count(updates) > before, _PATIENCE)
    assert not streaming.done()
    outcome = streaming.result()
    for engine in rig.site.fleet.decodes:
        engine.heal()
    before = rig.site.count(updates)
    rig.plane.apply(*_ours(rig))
    wait_for(lambda: rig.site.count(updates) > before, _PATIENCE)
    return outcome
