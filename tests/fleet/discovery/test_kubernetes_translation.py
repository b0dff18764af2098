"""EndpointSlices and pods become members by the rules of their modules."""

import json
from typing import Any

import pytest

from dp_extproc.config.discovery import MemberState
from dp_extproc.fleet.discovery.kubernetes.parts import Part, combine
from dp_extproc.fleet.discovery.kubernetes.pods import read_pod
from dp_extproc.fleet.discovery.kubernetes.slices import read_slice
from dp_extproc.fleet.discovery.source import Member
from kube_api import Manifest, endpoint_slice, pod

READY, NOT_READY, TERMINATING = MemberState.READY, MemberState.NOT_READY, MemberState.TERMINATING
LWS_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"


def slice_part(manifest: Manifest, port: int | str | None = None, group_label: str | None = None) -> Part:
    return read_slice(json.dumps(manifest).encode(), port, group_label)


def pod_part(manifest: Manifest, port: int | str | None = None, group_label: str | None = None) -> Part:
    return read_pod(json.dumps(manifest).encode(), port, group_label)


def only(part: Part) -> Member:
    assert not part.problem
    (member,) = part.members
    return member


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ({}, READY),
        (None, READY),
        ({"ready": None, "serving": None, "terminating": None}, READY),
        ({"ready": True, "serving": True, "terminating": False}, READY),
        ({"ready": False}, NOT_READY),
        ({"ready": False, "serving": False, "terminating": False}, NOT_READY),
        ({"ready": False, "serving": True, "terminating": True}, TERMINATING),
        ({"ready": True, "terminating": True}, TERMINATING),  # publishNotReadyAddresses
    ],
)
def test_a_slice_gives_the_state_of_each_endpoint(conditions: dict[str, bool] | None, state: MemberState) -> None:
    """A condition that is left out has the default of the API."""
    manifest = endpoint_slice("decode-1", "decode", "10.0.0.1")
    manifest["endpoints"][0]["conditions"] = conditions
    assert only(slice_part(manifest)).state is state


@pytest.mark.parametrize(
    ("phase", "ready", "meta", "state"),
    [
        ("Running", True, {}, READY),
        ("Running", False, {}, NOT_READY),
        ("Pending", True, {}, NOT_READY),
        ("Running", True, {"deletionTimestamp": "2026-01-01T00:00:00Z"}, TERMINATING),
        ("Succeeded", True, {}, None),
        ("Failed", False, {}, None),
        ("Running", True, {"labels": {LWS_INDEX: "0"}}, READY),
        ("Running", True, {"labels": {LWS_INDEX: "1"}}, None),
    ],
)
def test_a_pod_gives_its_state(phase: str, ready: bool, meta: dict[str, Any], state: MemberState | None) -> None:
    """A pod that has ended, and a worker of a LeaderWorkerSet, is no member."""
    manifest = pod("decode-0", "10.0.0.1", ready=ready, **meta)
    manifest["status"]["phase"] = phase
    part = pod_part(manifest)
    assert [each.state for each in part.members] == ([] if state is None else [state])
    assert not part.problem


def test_a_pod_is_no_member_before_it_has_an_address() -> None:
    """A pod that waits for a node has a status without one."""
    manifest = pod("decode-0", "")
    assert pod_part(manifest) == Part()
    assert pod_part({"metadata": manifest["metadata"]}) == Part()


def test_a_member_has_the_identity_of_its_pod() -> None:
    """An address may be used again by another pod."""
    member = only(slice_part(endpoint_slice("decode-1", "decode", "10.0.0.1")))
    assert (member.uid, member.name, member.url) == ("uid-10.0.0.1", "pod-10.0.0.1", "http://10.0.0.1:30000")
    member = only(pod_part(pod("decode-0", "10.0.0.1")))
    assert (member.uid, member.name, member.host, member.port) == ("uid-decode-0", "decode-0", "10.0.0.1", 30000)


def test_an_endpoint_without_pod_is_identified_by_its_slice_and_address() -> None:
    """Such slices are written by hand, for engines outside of the cluster."""
    manifest = endpoint_slice("decode-1", "decode", "10.0.0.1")
    manifest["metadata"]["namespace"] = "llm"
    del manifest["endpoints"][0]["targetRef"]
    assert only(slice_part(manifest)).uid == "llm/decode-1/10.0.0.1:30000"


@pytest.mark.parametrize(
    ("declared", "wanted", "number"),
    [
        ([("metrics", 9090), ("http", 30000)], None, 30000),
        ([("api", 8000)], None, 8000),
        ([("", 8000)], None, 8000),
        ([("bootstrap", 8998), ("api", 8000)], None, 8000),
        ([("metrics", 9090), ("api", 8000)], "api", 8000),
        ([("metrics", 9090), ("api", 8000)], 1234, 1234),
        ([], 1234, 1234),
    ],
)
def test_the_port_is_picked_by_name_or_if_it_is_the_only_one(
    declared: list[tuple[str, int]], wanted: int | str | None, number: int
) -> None:
    """The order of ports never counts."""
    manifest = endpoint_slice("decode-1", "decode", "10.0.0.1")
    manifest["ports"] = [{"name": name, "port": port} for name, port in declared]
    assert only(slice_part(manifest, wanted)).port == number
    manifest = pod("decode-0", "10.0.0.1")
    manifest["spec"]["containers"][0]["ports"] = [{"name": name, "containerPort": port} for name, port in declared]
    assert only(pod_part(manifest, wanted)).port == number


@pytest.mark.parametrize(
    ("declared", "wanted"),
    [([("metrics", 9090), ("api", 8000)], None), ([("api", 8000)], "http"), ([], None), ([("api", 0)], "api")],
)
def test_a_port_that_is_not_there_is_a_problem_with_a_remedy(declared: list[tuple[str, int]], wanted: str) -> None:
    """The names of the declared ports are in the message."""
    manifest = endpoint_slice("decode-1", "decode", "10.0.0.1")
    manifest["ports"] = [{"name": name, "port": port} for name, port in declared]
    part = slice_part(manifest, wanted)
    assert part.members == ()
    assert part.problem.startswith("Service decode")
    assert "port" in part.problem


def test_ports_of_other_protocols_are_left_out() -> None:
    """A UDP port may have the name of a TCP port."""
    manifest = endpoint_slice("decode-1", "decode", "10.0.0.1")
    manifest["ports"] = [{"name": "http", "port": 443, "protocol": "UDP"}, {"name": "http", "port": 80}]
    assert only(slice_part(manifest)).port == 80


@pytest.mark.parametrize("of_what", ["slice", "pod"])
@pytest.mark.parametrize(
    ("labels", "annotations", "label", "group"),
    [
        ({}, {}, None, None),
        ({"sglang.ai/transfer-group": "a", "disaggregatedset.x-k8s.io/revision": "b"}, {}, None, "a"),
        ({"disaggregatedset.x-k8s.io/revision": "b"}, {}, None, "b"),
        ({}, {"smg.ai/pairing-protocol": "c"}, None, "c"),
        ({"sglang.ai/transfer-group": "a", "revision": "d"}, {"revision": "e"}, "revision", "d"),
        ({"sglang.ai/transfer-group": "a"}, {"revision": "e"}, "revision", "e"),
        ({"sglang.ai/transfer-group": "a"}, {}, "revision", None),
        ({"leaderworkerset.sigs.k8s.io/template-revision-hash": "f"}, {}, None, None),
    ],
)
def test_the_revision_group_is_a_label_or_an_annotation(
    of_what: str, labels: dict[str, str], annotations: dict[str, str], label: str | None, group: str | None
) -> None:
    """The hash of a LeaderWorkerSet is no group: those of prefill and decode always differ."""
    manifest = endpoint_slice("decode-1", "decode", "10.0.0.1") if of_what == "slice" else pod("decode-0", "10.0.0.1")
    manifest["metadata"] |= {"labels": labels, "annotations": annotations}
    read = slice_part if of_what == "slice" else pod_part
    assert only(read(manifest, None, label)).group == group


@pytest.mark.parametrize("value", ["two words", "x" * 254, "\u00fc"])
def test_a_group_that_is_no_name_is_a_problem(value: str) -> None:
    """The member would be paired with any group otherwise."""
    manifest = pod("decode-0", "10.0.0.1", annotations={"sglang.ai/transfer-group": value})
    assert "group" in pod_part(manifest).problem


def test_the_bootstrap_port_is_an_annotation_or_a_named_port() -> None:
    """The annotation counts first."""
    manifest = endpoint_slice("prefill-1", "prefill", "10.0.0.1")
    assert only(slice_part(manifest)).bootstrap_port is None
    manifest["ports"].append({"name": "bootstrap", "port": 8998, "protocol": "TCP"})
    assert only(slice_part(manifest)).bootstrap_port == 8998
    manifest = pod("prefill-0", "10.0.0.1", annotations={"sglang.ai/bootstrap-port": "9001"})
    manifest["spec"]["containers"].append({"ports": [{"name": "bootstrap", "containerPort": 8998}]})
    assert only(pod_part(manifest)).bootstrap_port == 9001


@pytest.mark.parametrize("value", ["0", "65536", "1e3", "-1", " 8998", "9" * 5000, "\u0663"])
def test_a_bootstrap_port_that_is_none_is_a_problem(value: str) -> None:
    """Whoever may write a pod writes its annotations."""
    manifest = pod("prefill-0", "10.0.0.1", annotations={"sglang.ai/bootstrap-port": value})
    part = pod_part(manifest)
    assert part.members == ()
    assert "bootstrap-port" in part.problem
    assert len(part.problem) < 200


def test_a_slice_without_endpoints_is_no_problem() -> None:
    """Kubernetes writes one without ports for a Service without pods."""
    assert combine([slice_part(endpoint_slice("decode-1", "decode"))]).problems == ()


@pytest.mark.parametrize(("kind", "address"), [("FQDN", "engine.example"), ("IPv4", "x\r\ny"), ("IPv4", "")])
def test_an_address_that_is_no_ip_address_is_a_problem(kind: str, address: str) -> None:
    """Envoy connects to addresses alone."""
    manifest = endpoint_slice("decode-1", "decode", address)
    manifest["addressType"] = kind
    assert "address" in slice_part(manifest).problem


def test_slices_of_one_service_are_merged() -> None:
    """A slice holds at most 100 endpoints."""
    slices = [
        endpoint_slice("decode-1", "decode", "10.0.0.1", "10.0.0.2"),
        endpoint_slice("decode-2", "decode", "10.0.0.3"),
    ]
    found = combine([slice_part(each) for each in slices])
    assert [each.host for each in found.members] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


def test_one_address_family_of_a_service_counts() -> None:
    """A pod of a dual-stack Service has an address in each, and is one engine. A family may have no endpoints."""
    both = [
        endpoint_slice("decode-6", "decode", "fd00::1", "fd00::2"),
        endpoint_slice("decode-4", "decode", "10.0.0.1", "10.0.0.2"),
        endpoint_slice("other-4", "other"),
        endpoint_slice("other-6", "other", "fd00::3"),
    ]
    found = combine([slice_part(each) for each in both])
    assert [each.url for each in found.members] == [
        "http://10.0.0.1:30000",
        "http://10.0.0.2:30000",
        "http://[fd00::3]:30000",
    ]


def test_a_problem_of_one_object_leaves_the_others() -> None:
    """Each problem is reported once."""
    parts = [slice_part(endpoint_slice("decode-1", "decode", "10.0.0.1"), "http")]
    broken = slice_part(endpoint_slice("old-1", "old", "10.0.0.9"), "grpc")
    found = combine([*parts, broken, broken])
    assert [each.host for each in found.members] == ["10.0.0.1"]
    assert found.problems == ("Service old: no port is named grpc (there are: http); write port: NAME or port: NUMBER",)
