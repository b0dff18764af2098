"""What Envoy Gateway makes of the printed resources: names, a second instance, mistakes, and changes under load."""

import asyncio
import base64
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from dp_extproc.config import Config, PrefillLeg
from dp_extproc.envoy_check import Severity, audit
from dp_extproc.envoy_check.reader import read_envoy
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats.target import ObjectName, Target
from dp_extproc.lab.testbed import loopback
from faults.fleet import BODIES, ask
from interop.envoy_gateway.control_plane import GATEWAY, NAMESPACE, PORT, TLS_PORT, ControlPlane
from interop.envoy_gateway.recording import differences, record, whole_resources
from interop.istio.recording import delivered
from interop.mesh.scenarios import CHAT, hostile_headers
from interop.mesh.site import Site
from patience import wait_for

HOST: Final = "llm.example.com"
SECOND: Final = "second.example.com"
NEIGHBOUR: Final = "other.example.com"
OURS: Final = "dp-extproc"
_EXTENSIONS: Final = "gateway.envoyproxy.io"
_API: Final = "gateway.networking.k8s.io"
_PATIENCE: Final = 20.0
_SETTLED: Final = 3.0
"""Seconds after which Envoy has what was applied before."""
_STREAM_SECONDS: Final = 30
"""How long a stream lasts under which something changes. Envoy Gateway needs two seconds for a change, or many more if
the machine is busy."""


def target_of(host: str, *listeners: str) -> Target:
    """Name the gateway of the run."""
    return Target(ObjectName(NAMESPACE, GATEWAY), (host,), PORT, listeners)


def printed(config: Config, host: str = HOST, *listeners: str) -> Mapping[str, str]:
    """Print the resources for a host name, as ``dp-extproc envoy-config`` does."""
    return FORMS["envoy-gateway"].files(config, target_of(host, *(listeners or ("http",))))


def neighbour_of(port: int, *sections: str) -> str:
    """Write the route of another team, with a backend of its own."""
    name = {"name": "other", "namespace": NAMESPACE}
    backend = {
        "apiVersion": f"{_EXTENSIONS}/v1alpha1",
        "kind": "Backend",
        "metadata": name,
        "spec": {"endpoints": [{"ip": {"address": "127.0.0.1", "port": port}}]},
    }
    route = {
        "apiVersion": f"{_API}/v1",
        "kind": "HTTPRoute",
        "metadata": name,
        "spec": {
            "parentRefs": [{"name": GATEWAY, "sectionName": each} for each in sections or ("http",)],
            "hostnames": [NEIGHBOUR],
            "rules": [
                {
                    "timeouts": {"request": "0s"},  # as a team with long streams has it
                    "backendRefs": [{"group": _EXTENSIONS, "kind": "Backend", "name": "other"}],
                }
            ],
        },
    }
    return yaml.safe_dump_all([backend, route])


@dataclass(frozen=True, slots=True)
class Rig:
    """What each case gets."""

    site: Site
    plane: ControlPlane
    texts: Mapping[str, str]
    """The printed resources by file name."""

    @property
    def listeners(self) -> set[str]:
        """Return the names of the internal listeners that are printed."""
        resources = whole_resources(list(yaml.safe_load_all(self.texts["dp-extproc.yaml"])))
        return {each["name"] for each in resources if "internal_listener" in each}

    def add(self, case: str, seen: str, *, good: bool) -> None:
        self.site.report.add(case, seen, good=good)

    def asks(self, host: str = HOST, **more: Any) -> str:
        """Send a chat to a host, and return its result."""
        with loopback.client(self.plane.url, timeout=60) as client:
            client.headers["host"] = host
            return str(ask(client, CHAT, stream=False, **more))

    def programmed(self, name: str = OURS) -> tuple[str, str]:
        """Return status and message of an EnvoyPatchPolicy."""
        return self.plane.conditions("EnvoyPatchPolicy", name).get("Programmed", ("", ""))

    def neighbour_answers(self) -> bool:
        return self.site.neighbour.get("/").status_code == 200

    def apply(self, text: str) -> None:
        """Apply our resources, and wait until Envoy has the printed block and route."""
        self.plane.apply("ours", text)
        wait_for(lambda: self.programmed()[0] == "True" and self.listeners <= set(self.plane.listeners()), _PATIENCE)
        wait_for(lambda: self.asks() == "answer", _PATIENCE)

    def modified(self) -> int:
        """Return how often Envoy's listeners were replaced, whole or in place."""
        return self.plane.statistic("listener_manager.listener_modified")

    def checked(self, *expected: str) -> None:
        """Let ``dp-extproc check --envoy`` read this Envoy, and compare the codes of the errors that it finds."""
        found = audit(asyncio.run(read_envoy([self.plane.admin_url])), self.site.fleet.config)
        errors = {each.code for each in found if each.severity is Severity.ERROR}
        warnings = {each.code for each in found} - errors
        seen = f"errors: {sorted(errors)}; warnings: {sorted(warnings)}"
        self.add("... and dp-extproc check --envoy", seen, good=errors == set(expected))

    def wrong(self, what: str, text: str, expected: str, *codes: str) -> None:
        """Apply resources with a mistake, and wait for what clients get then, and what the check finds."""
        assert text != self.texts["dp-extproc.yaml"], what
        self.plane.apply("ours", text)
        wait_for(lambda: self.programmed()[0] == "False", _PATIENCE)
        message = self.programmed()[1]
        wait_for(lambda: self.asks().startswith(expected), _PATIENCE)
        other = self.neighbour_answers()
        text = f"{message[:60]} ... {message[-60:]}" if len(message) > 125 else message
        seen = f"Programmed=False: {text}; our host: {self.asks()}; neighbour served: {other}"
        self.add(what, seen, good=other)
        self.checked(*codes)
        self.apply(self.texts["dp-extproc.yaml"])


def accepted(rig: Rig, recordings: Path | None = None) -> None:
    """Envoy Gateway applies every patch, and Envoy has the block as printed, with retries on our route alone."""
    wait_for(lambda: rig.programmed()[0] == "True", _PATIENCE)
    wait_for(lambda: rig.listeners <= set(rig.plane.listeners()), _PATIENCE)
    rig.add("EnvoyPatchPolicy", "Programmed=True: " + rig.programmed()[1], good=True)
    attached = rig.plane.conditions("HTTPRoute", OURS)
    good = all(attached[each][0] == "True" for each in ("Accepted", "ResolvedRefs"))
    rig.add("HTTPRoute", str({kind: status for kind, (status, _) in attached.items()}), good=good)
    bootstrap = next(each["bootstrap"] for each in rig.plane.dump()["configs"] if "bootstrap" in each)
    extensions = [each["name"] for each in bootstrap["bootstrap_extensions"]]
    rig.add("bootstrap extensions", str(extensions), good=extensions == ["envoy.bootstrap.internal_listener"])
    resources, ours = delivered(rig.plane.admin_url), list(yaml.safe_load_all(rig.texts["dp-extproc.yaml"]))
    different = differences(resources, ours)
    rig.add("clusters and listeners that differ from the printed ones", str(different), good=not different)
    routes = [
        route
        for table in resources["dynamic_route_configs"]
        for host in table["virtual_hosts"]
        for route in host["routes"]
    ]
    retried = [route["route"]["cluster"] for route in routes if "retry_policy" in route["route"]]
    buffered = [route["route"]["cluster"] for route in routes if "request_body_buffer_limit" in route]
    seen = f"of {len(routes)} routes with retries: {retried}, with a buffer: {buffered}"
    rig.add("routes of the gateway", seen, good=retried == buffered == [f"httproute/{NAMESPACE}/{OURS}/rule/0"])
    rig.checked()
    if recordings is not None:
        record(recordings / "envoy-gateway.json", ours, resources)


def second_instance(rig: Rig) -> None:
    """Two instances share a gateway if one has a prefix."""
    envoy = rig.site.fleet.config.envoy.model_copy(update={"name_prefix": "second_"})
    texts = printed(rig.site.fleet.config.model_copy(update={"envoy": envoy}), SECOND)
    rig.plane.apply("second", texts["dp-extproc.yaml"])
    wait_for(lambda: rig.programmed("second-dp-extproc")[0] == "True", _PATIENCE)
    wait_for(lambda: "second_dp_dispatch" in rig.plane.listeners(), _PATIENCE)
    both = [rig.asks(SECOND), rig.asks()]
    rig.plane.delete("second")
    wait_for(lambda: "second_dp_dispatch" not in rig.plane.listeners(), _PATIENCE)
    after = rig.asks()
    seen = f"both answer: {both}; after its deletion the first one: {after}"
    rig.add("two instances on one gateway, name_prefix", seen, good=[*both, after] == ["answer"] * 3)


def tls_listener(rig: Rig) -> None:
    """A listener with TLS has a route table of its own, which gets the same patches."""
    folder = rig.plane.directory
    _certificate(folder)
    gateway = _with_tls(rig.texts["gateway.yaml"], folder)
    both = printed(rig.site.fleet.config, HOST, "http", "https")["dp-extproc.yaml"]
    table = f"{NAMESPACE}/{GATEWAY}/https"
    rig.plane.apply("gateway", gateway)
    wait_for(lambda: table in rig.plane.listeners(), _PATIENCE)
    rig.plane.apply("ours", both)
    wait_for(lambda: _retries(rig).get(table), _PATIENCE)
    context = ssl.create_default_context(cafile=folder / "tls.crt")
    failing = rig.site.fleet.decodes[0]
    failing.forget()
    failing.fault(inference="503")
    answers: list[int] = []
    with httpx.Client(base_url=f"https://127.0.0.1:{TLS_PORT}", verify=context, trust_env=False, timeout=60) as client:
        client.headers["host"] = HOST
        while not failing.requests() and len(answers) < 60:
            answer = client.post(CHAT, json=BODIES[CHAT], extensions={"sni_hostname": HOST})
            answers.append(answer.status_code)
    rig.site.fleet.recover()
    seen = f"{len(answers)} requests: {sorted(set(answers))}; {len(failing.requests())} met a 503 and were repeated"
    rig.add("listener with TLS", seen, good=set(answers) == {200} and bool(failing.requests()))
    rig.apply(rig.texts["dp-extproc.yaml"])
    rig.plane.apply("gateway", rig.texts["gateway.yaml"])
    wait_for(lambda: table not in rig.plane.listeners(), _PATIENCE)


def _retries(rig: Rig) -> dict[str, bool]:
    """Return whether a route of each route table has retries."""
    (tables,) = (each for each in rig.plane.dump()["configs"] if "dynamic_route_configs" in each)
    configs = [each["route_config"] for each in tables["dynamic_route_configs"]]
    return {each["name"]: "retriable-headers" in str(each) for each in configs}


def trusted_addresses(rig: Rig) -> None:
    """Hostile headers have no effect either if the gateway takes client addresses from x-forwarded-for."""
    documents = list(yaml.safe_load_all(rig.texts["gateway.yaml"]))
    clients = next(each for each in documents if each["kind"] == "ClientTrafficPolicy")
    clients["spec"]["clientIPDetection"] = {"xForwardedFor": {"numTrustedHops": 1}}
    changed = rig.plane.statistic("listener_manager.listener_modified")
    rig.plane.apply("gateway", yaml.safe_dump_all(documents))
    wait_for(lambda: rig.plane.statistic("listener_manager.listener_modified") > changed, _PATIENCE)
    rig.site.client.headers["x-forwarded-for"] = "10.0.0.7"
    rig.add("clientIPDetection: xForwardedFor", "the same headers again:", good=True)
    hostile_headers(rig.site)
    del rig.site.client.headers["x-forwarded-for"]
    rig.plane.apply("gateway", rig.texts["gateway.yaml"])


def changes_while_a_stream_runs(rig: Rig) -> None:
    """A change of the gateway's listener or of the block lets a stream go on, for as long as shutdown.drainTimeout."""
    documents = list(yaml.safe_load_all(rig.texts["gateway.yaml"]))
    clients = next(each for each in documents if each["kind"] == "ClientTrafficPolicy")
    clients["spec"]["timeout"]["http"]["idleTimeout"] = "1800s"
    ours = rig.texts["dp-extproc.yaml"]
    for what, name, text in (
        ("the gateway's listener changes", "gateway", yaml.safe_dump_all(documents)),
        ("dp_dispatch changes", "ours", _changed(ours)),
    ):
        modified = rig.modified()
        outcome = _streaming(rig, partial(rig.plane.apply, name, text))
        seen = f"{rig.modified() - modified} listeners modified; the stream: {outcome}; then: {rig.asks()}"
        rig.add(f"{what} while a stream runs", seen, good=outcome == "answer" and rig.asks() == "answer")
    rig.plane.apply("gateway", rig.texts["gateway.yaml"])
    rig.apply(ours)
    time.sleep(_SETTLED)
    modified = rig.modified()
    rig.plane.apply("ours", f"{ours}\n# Applied again.\n")
    time.sleep(_SETTLED)
    rig.add("ours is applied again", f"{rig.modified() - modified} listeners modified", good=rig.modified() == modified)


def short_drain(rig: Rig) -> None:
    """With shutdown.drainTimeout of 1 s a change cuts older streams, and a listener that is gone serves no more."""
    ours = rig.texts["dp-extproc.yaml"]
    outcome = _streaming(rig, partial(rig.plane.apply, "ours", _changed(ours)), 2 * _STREAM_SECONDS)
    rig.add("dp_dispatch changes, drainTimeout: 1s", f"the stream: {outcome}", good=outcome != "answer")
    listener = ours.replace("stat_prefix: dp_dispatch", "typo: dp_dispatch")
    rig.wrong("a listener with an unknown field", listener, "503", "listener_missing")
    rig.plane.delete("ours")
    wait_for(lambda: not rig.listeners & set(rig.plane.listeners()), _PATIENCE)
    began = threading.Event()
    streaming = rig.site.threads.submit(rig.site.stream_of_neighbour, _STREAM_SECONDS, began.set)
    assert began.wait(_PATIENCE)
    rig.apply(ours)
    running = not streaming.done()
    seen = streaming.result()
    rig.add("ours applied under a stream of the neighbour", f"its stream: {seen}", good=running and seen == "complete")


def wrong_patches(rig: Rig) -> None:
    """One wrong patch is left out and the others apply. Our host fails closed, and the neighbour is served."""
    ours, table = rig.texts["dp-extproc.yaml"], f"name: {NAMESPACE}/{GATEWAY}/"
    mirrored = rig.site.fleet.config.prefill_leg is PrefillLeg.ENVOY
    name, expected = ("prefill", "502 prefill_failed") if mirrored else ("decode_server", "503")
    cluster = ours.replace(f"name: {name}\n        type: ORIG", f"name: {name}\n        typo: ORIG")
    rig.wrong("a cluster with an unknown field", cluster, expected, "cluster_missing")
    rig.wrong(
        "a route table that does not exist",
        ours.replace(f"{table}http", f"{table}web"),
        "answer",
        "retry_policy_missing",
    )
    rig.plane.delete("ours")
    wait_for(lambda: not rig.listeners & set(rig.plane.listeners()), _PATIENCE)
    rig.plane.apply("ours", "---\n".join(ours.split("---\n")[:2]))
    wait_for(lambda: rig.asks().startswith("503"), _PATIENCE)
    seen = f"our host: {rig.asks()}; neighbour served: {rig.neighbour_answers()}"
    rig.add("Backend and HTTPRoute without the policy", seen, good=rig.neighbour_answers())
    rig.checked("cluster_missing", "listener_missing", "no_entrance")
    rig.apply(ours)


def deleted(rig: Rig) -> None:
    """After the deletion of our resources the neighbour is served, and nothing of the block is left."""
    rig.plane.delete("ours")
    wait_for(lambda: not rig.listeners & set(rig.plane.listeners()), _PATIENCE)
    rig.add("our resources deleted", f"our host: {rig.asks()}", good=rig.neighbour_answers())


def broken_bootstrap(rig: Rig) -> None:
    """With the extension missing or there twice, our host fails closed and the neighbour is served."""
    wait_for(lambda: rig.programmed()[0] == "True", _PATIENCE)
    wait_for(rig.neighbour_answers, _PATIENCE)
    bootstrap = next(each["bootstrap"] for each in rig.plane.dump()["configs"] if "bootstrap" in each)
    count = len(bootstrap.get("bootstrap_extensions", ()))
    listeners = sorted(rig.listeners & set(rig.plane.listeners()))
    result = rig.asks()
    refusals = [line for line in rig.plane.envoy_log().splitlines() if "nternal" in line and "warning" in line]
    logged = refusals[-1][-200:] if refusals else "nothing"
    seen = f"Programmed=True; of our listeners: {listeners}; our host: {result}; Envoy's log: {logged}"
    rig.add(f"extension there {count} times", seen, good=result.startswith("503") and rig.neighbour_answers())
    rig.checked(*(("extension_twice",) if count else ("extension_missing", "listener_missing", "update_rejected")))


CASES: Final[Sequence[Callable[[Rig], None]]] = (
    second_instance,
    tls_listener,
    trusted_addresses,
    changes_while_a_stream_runs,
    wrong_patches,
    deleted,
)


def _with_proxy(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    documents = list(yaml.safe_load_all(text))
    change(next(each["spec"] for each in documents if each["kind"] == "EnvoyProxy"))
    return yaml.safe_dump_all(documents)


def _without_extension(spec: dict[str, Any]) -> None:
    del spec["bootstrap"]


def _with_two_extensions(spec: dict[str, Any]) -> None:
    spec["bootstrap"]["jsonPatches"][0]["value"] *= 2


def _with_short_drain(spec: dict[str, Any]) -> None:
    spec["shutdown"]["drainTimeout"] = "1s"


OTHER_GATEWAYS: Final[Mapping[str, tuple[Callable[[str], str], Callable[[Rig], None]]]] = {
    "short_drain": (partial(_with_proxy, change=_with_short_drain), short_drain),
    "without_extension": (partial(_with_proxy, change=_without_extension), broken_bootstrap),
    "two_extensions": (partial(_with_proxy, change=_with_two_extensions), broken_bootstrap),
}
"""Gateways with other settings, each with its case. Envoy reads its bootstrap and its drain time once."""


def _changed(text: str) -> str:
    """Change the internal listeners of printed resources."""
    return text.replace("max_headers_count: 200", "max_headers_count: 201")


def _streaming(rig: Rig, change: Callable[[], object], seconds: float = _STREAM_SECONDS) -> str:
    """Request a stream that lasts so long, change listeners after its first event, and return its result."""
    modified = rig.modified()

    def change_listeners() -> None:
        change()
        wait_for(lambda: rig.modified() > modified, seconds / 2)

    for engine in rig.site.fleet.decodes:
        engine.fault(inference={"kind": "slow", "after": 1, "seconds": seconds})
    try:
        return str(ask(rig.site.client, CHAT, stream=True, patience=2 * seconds, on_first=change_listeners))
    finally:
        rig.site.fleet.recover()


def _certificate(folder: Path) -> None:
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}"]
    argv += [
        "-addext",
        f"subjectAltName=DNS:{HOST}",
        "-keyout",
        str(folder / "tls.key"),
        "-out",
        str(folder / "tls.crt"),
    ]
    subprocess.run(argv, check=True, capture_output=True)


def _with_tls(text: str, folder: Path) -> str:
    documents = list(yaml.safe_load_all(text))
    gateway = next(each for each in documents if each["kind"] == "Gateway")
    certificate = {"mode": "Terminate", "certificateRefs": [{"kind": "Secret", "name": "llm"}]}
    gateway["spec"]["listeners"].append({"name": "https", "protocol": "HTTPS", "port": TLS_PORT, "tls": certificate})
    data = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in ("tls.crt", "tls.key")}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "llm", "namespace": NAMESPACE},
        "type": "kubernetes.io/tls",
        "data": data,
    }
    return yaml.safe_dump_all([secret, *documents])
