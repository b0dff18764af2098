"""What the source reports of a real API server, alone: objects that change, rights, an outage, tokens, many slices."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_extproc.config.discovery import KubernetesSettings
from dp_extproc.fleet.discovery.kubernetes.reflector import Timing
from interop.kubernetes import chart
from interop.kubernetes.cluster import Cluster
from interop.kubernetes.fleet import ACCOUNT, CORE, NAMESPACE, SLICES, Pod, create_service, create_slice
from interop.kubernetes.recording import Recording, RecordingSource
from interop.report import Report
from patience import wait_for
from source_reports import Reports, reports_of

_OUTAGE_SECONDS = 60.0
_PATIENCE = 60.0
_MANY = 500
_REOPENING = Timing(watch=(3.0, 3.0), steady=0.0)
"""Watches of three seconds, so that the token is needed often."""


@dataclass(slots=True)
class Rig:
    """What each case gets."""

    cluster: Cluster
    programs: Path
    account: Path
    """A folder as a kubelet mounts it: token, namespace, ca.crt."""
    recordings: Path
    report: Report

    def rotate(self, name: str) -> Pod:
        """Start a pod with the account, and put its token in place of the present one, as a kubelet does."""
        pod = Pod(self.cluster, name)
        token = self.cluster.token(NAMESPACE, ACCOUNT, pod.create({"app": ACCOUNT}, 9002))
        new = self.account / ".token"
        new.write_text(token, encoding="utf-8")
        new.replace(self.account / "token")
        return pod

    @contextmanager
    def watching(self, name: str, timing: Timing | None = None, **settings: Any) -> Iterator[Reports]:
        """Run a source with the service account, and record its conversation."""
        source = RecordingSource(KubernetesSettings(**settings), timing=timing)
        source.recording = Recording(self.recordings / f"{name}.jsonl")
        with reports_of(source) as reports:
            yield reports


def states(reports: Reports) -> dict[str, str]:
    """Map the addresses of the last snapshot to their states."""
    return {each.host: each.state.value for each in reports.snapshots[-1]} if reports.snapshots else {}


def rights(rig: Rig) -> None:
    """Without rights the failure names what is missing. With them exactly two verbs on one resource are allowed."""
    with rig.watching("rights", service="decode") as reports:
        wait_for(lambda: reports.failures, _PATIENCE)
        refused = reports.failures[-1]
        rig.report.add("no rights", refused, good="cannot list" in refused and "RoleBinding" in refused)
        chart.grant(rig.cluster, rig.programs)
        wait_for(lambda: reports.snapshots, _PATIENCE)
    user = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"
    allowed = []
    for group, resource_, namespace in (
        ("discovery.k8s.io", "endpointslices", NAMESPACE),
        ("discovery.k8s.io", "endpointslices", "other"),
        ("discovery.k8s.io", "endpointslices", ""),
        *((group, name, NAMESPACE) for group, name in (("", "pods"), ("", "secrets"), ("", "services"))),
        ("", "configmaps", NAMESPACE),
    ):
        for verb in ("get", "list", "watch", "create", "update", "patch", "delete"):
            attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": resource_}
            spec = {"user": user, "resourceAttributes": attributes}
            answer = rig.cluster.request(
                "POST",
                "/apis/authorization.k8s.io/v1/subjectaccessreviews",
                {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec},
            )
            if answer["status"]["allowed"]:
                allowed.append(f"{verb} {resource_} in {namespace or 'all'}")
    wanted = {f"{verb} endpointslices in {NAMESPACE}" for verb in ("list", "watch")}
    rig.report.add("can-i with the Role of the chart", f"of 49: {', '.join(allowed)}", good=set(allowed) == wanted)
    count, unknown = chart.accepted(rig.cluster, rig.programs)
    seen = f"{count} objects accepted (server-side dry run), without the kinds {', '.join(unknown)}"
    rig.report.add("all topologies of the chart", seen, good=count > 20)


def pods_of_a_service(rig: Rig) -> None:
    """The controller of Kubernetes writes the slices: a pod starts, is ready, terminates, and is gone."""
    create_service(rig.cluster, "decode", {"sglang.ai/transfer-group": "r1"}, {"role": "decode"})
    pods = [Pod(rig.cluster, f"decode-{number}") for number in (1, 2)]
    seen: list[Any] = []
    with rig.watching("service", service="decode") as reports:
        wait_for(lambda: reports.snapshots, _PATIENCE)

        def comes(**wanted: str) -> None:
            expected = {address.replace("_", ".")[1:]: state for address, state in wanted.items()}
            wait_for(lambda: states(reports) == expected, _PATIENCE)
            seen.append(sorted(expected.values()))

        for number, pod in enumerate(pods, 1):
            pod.create({"role": "decode"}, 30000)
            pod.report(f"10.77.1.{number}", ready=False)
        comes(_10_77_1_1="not_ready", _10_77_1_2="not_ready")
        for number, pod in enumerate(pods, 1):
            pod.report(f"10.77.1.{number}", ready=True)
        comes(_10_77_1_1="ready", _10_77_1_2="ready")
        first = reports.snapshots[-1][0]
        pods[0].terminate()
        comes(_10_77_1_1="terminating", _10_77_1_2="ready")
        pods[0].report("10.77.1.1", ready=False)
        pods[0].remove()
        comes(_10_77_1_2="ready")
        create_slice(rig.cluster, "by-hand", "decode", "10.77.1.9", 31000)
        comes(_10_77_1_2="ready", _10_77_1_9="ready")
        rig.cluster.request("DELETE", f"{SLICES}/by-hand")
        comes(_10_77_1_2="ready")
        pods[1].terminate()
        pods[1].remove()
        comes()
        rig.cluster.request("DELETE", f"{CORE}/services/decode")
    good = first.group == "r1" and len(first.uid) == 36 and first.name == "decode-1" and not reports.failures
    rig.report.add("pods of a Service", f"{seen}; uid {first.uid}, group {first.group}", good=good)


def outage(rig: Rig) -> None:
    """The API server is away for a minute. Meanwhile one slice goes, and the history is compacted."""
    for number in (1, 2):
        create_slice(rig.cluster, f"away-{number}", "away", f"10.77.2.{number}")
    with rig.watching("outage", service="away") as reports:
        wait_for(lambda: len(states(reports)) == 2, _PATIENCE)
        rig.cluster.stop_api()
        removed = rig.cluster.remove_from_etcd(f"/registry/endpointslices/{NAMESPACE}/away-1")
        revision = rig.cluster.compact()
        time.sleep(_OUTAGE_SECONDS)
        during, tries = states(reports), len(reports.failures)
        rig.cluster.start_api()
        back = time.monotonic()
        wait_for(lambda: list(states(reports)) == ["10.77.2.2"], _PATIENCE)
        took = time.monotonic() - back
        create_slice(rig.cluster, "away-3", "away", "10.77.2.3")
        wait_for(lambda: len(states(reports)) == 2, _PATIENCE)
        rig.report.add(
            "API server away for 60 s",
            f"{removed} slice removed, history before {revision} compacted; kept {sorted(during)} over {tries} tries "
            f"({reports.failures[-1]}); present state {took:.1f} s after it was ready again",
            good=len(during) == 2 and tries > 3 and all(reports.snapshots) and removed == 1,
        )
    lines = (rig.recordings / "outage.jsonl").read_text(encoding="utf-8")
    gone = [line.strip() for line in lines.splitlines() if '"code": 410' in line]
    lists = lines.count('{"list"')
    rig.report.add("410", f"{len(gone)} events, {lists} lists; {gone[0] if gone else ''}", good=len(gone) == 1)


def rotation(rig: Rig) -> None:
    """A token ends with the pod that it is bound to. The file is replaced, and each request has the present token."""
    create_slice(rig.cluster, "rotation-1", "rotation", "10.77.3.1")
    old = rig.rotate("extproc-1")
    with rig.watching("rotation", _REOPENING, service="rotation") as reports:
        wait_for(lambda: len(states(reports)) == 1, _PATIENCE)
        before = (rig.account / "token").read_text(encoding="utf-8")
        new = rig.rotate("extproc-2")
        old.remove()
        after = (rig.account / "token").read_text(encoding="utf-8")

        def status_of(token: str) -> int:
            return rig.cluster.client.get(SLICES, headers={"Authorization": f"Bearer {token}"}).status_code

        wait_for(lambda: status_of(before) == 401, _PATIENCE)  # an API server keeps its judgement for ten seconds
        statuses = [status_of(before), status_of(after)]
        create_slice(rig.cluster, "rotation-2", "rotation", "10.77.3.2")
        wait_for(lambda: len(states(reports)) == 2, _PATIENCE)
        time.sleep(2 * _REOPENING.watch[1])
        failures = len(reports.failures)
        new.remove()
        wait_for(lambda: reports.is_failing, _PATIENCE)
        refused, kept = reports.failures[-1], states(reports)
        rig.rotate("extproc-3")
        wait_for(lambda: not reports.is_failing, _PATIENCE)
    rig.report.add(
        "token rotation",
        f"the old token gets {statuses[0]}, the new one {statuses[1]}, the source had {failures} failures; "
        f"without a valid token: {refused}; kept {sorted(kept)}; a new file ended the failure",
        good=statuses == [401, 200] and failures == 0 and "401" in refused and len(kept) == 2,
    )


def leader_worker_set(rig: Rig) -> None:
    """Of a LeaderWorkerSet only the leader is a member, with pods as source."""
    index = "leaderworkerset.sigs.k8s.io/worker-index"
    for number in (0, 1, 2):
        pod = Pod(rig.cluster, f"lws-0{f'-{number}' if number else ''}")
        pod.create({"app": "lws", index: str(number)}, 30000)
        pod.report(f"10.77.4.{number + 1}", ready=True)
    with rig.watching("pods", pods="app=lws") as reports:
        wait_for(lambda: reports.failures, _PATIENCE)
        refused = reports.failures[-1]
        grant_pods(rig.cluster)
        wait_for(lambda: states(reports), _PATIENCE)
        found = states(reports)
    good = found == {"10.77.4.1": "ready"} and "pods" in refused
    rig.report.add("LeaderWorkerSet", f"first: {refused}; then of 3 pods: {found}", good=good)


def many_slices(rig: Rig) -> None:
    """500 slices of 500 Services, selected by a label, are one set."""
    for number in range(_MANY):
        name = f"many-{number}"
        slice_ = {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name, "app": "many"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 30000}],
            "endpoints": [{"addresses": [f"10.78.{number // 250}.{number % 250 + 1}"]}],
        }
        rig.cluster.request("POST", SLICES, slice_)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with rig.watching("many", selector="app=many") as reports:
        wait_for(lambda: len(states(reports)) == _MANY, _PATIENCE)
        took, grown = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        began = time.monotonic()
        rig.cluster.request("DELETE", f"{SLICES}/many-0")
        wait_for(lambda: len(states(reports)) == _MANY - 1, _PATIENCE)
        seen = time.monotonic() - began
        rig.cluster.request("DELETE", f"{SLICES}?labelSelector=app%3Dmany")
        wait_for(lambda: states(reports) == {}, _PATIENCE)
    text = (rig.recordings / "many.jsonl").read_text(encoding="utf-8")
    lists, pages = text.count('{"list"'), text.count('{"page"')
    rig.report.add(
        "500 slices",
        f"listed in {took:.2f} s as {pages} pages, {grown / 1024:.1f} MiB more at the most; a deletion was seen "
        f"after {1000 * seen:.0f} ms, 500 after each other without another list",
        good=lists == pages and not reports.failures,
    )


def grant_pods(cluster: Cluster) -> None:
    """Allow pods as well."""
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}"
    meta = {"name": f"{ACCOUNT}-pods", "namespace": NAMESPACE}
    cluster.request("POST", f"{path}/roles", {"metadata": meta, "rules": rules})
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": meta["name"]}
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}
    cluster.request("POST", f"{path}/rolebindings", {"metadata": meta, "roleRef": role, "subjects": [subject]})


CASES: tuple[Callable[[Rig], None], ...] = (
    rights,
    pods_of_a_service,
    rotation,
    many_slices,
    outage,
    leader_worker_set,
)
