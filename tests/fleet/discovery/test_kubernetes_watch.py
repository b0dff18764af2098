"""The Kubernetes source against a stand-in of the API server: lists, watches, and every fault between them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dp_extproc.config.discovery import KubernetesSettings, MemberState
from dp_extproc.engines.model import SourceKind
from dp_extproc.fleet.discovery.kubernetes.reflector import Timing
from dp_extproc.fleet.discovery.kubernetes.source import KubernetesSource
from kube_api import PODS, SLICES, TOKEN, FakeApiServer, endpoint_slice, pod
from patience import wait_for
from source_reports import Reports, reports_of

FAST = Timing(first_pause=0.02, longest_pause=0.1, steady=0.0)
"""Real pauses, but short ones. A watch counts as steady at once, so that each fault is like the first."""


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with FakeApiServer(bookmarks=0.02) as running:
        yield running


def kubeconfig(folder: Path, api: FakeApiServer, **user: str) -> dict[str, str]:
    """Write a kubeconfig, and return the environment that names it."""
    content = {
        "clusters": [{"name": "c", "cluster": {"server": api.url}}],
        "users": [{"name": "u", "user": user or {"token": TOKEN}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}],
        "current-context": "x",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(content), encoding="utf-8")
    return {"KUBECONFIG": str(path)}


@contextmanager
def watching(api: FakeApiServer, folder: Path, timing: Timing = FAST, **settings: Any) -> Iterator[Reports]:
    source = KubernetesSource(
        KubernetesSettings(**settings or {"service": "decode"}), environment=kubeconfig(folder, api), timing=timing
    )
    with reports_of(source) as reports:
        yield reports


def urls(*numbers: int) -> set[str]:
    return {f"http://10.0.0.{number}:30000" for number in numbers}


def hosts(*numbers: int) -> list[str]:
    return [f"10.0.0.{number}" for number in numbers]


def test_a_change_of_a_slice_is_reported_as_the_whole_set(api: FakeApiServer, tmp_path: Path) -> None:
    """Slices of other Services and namespaces do not count."""
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1, 2)))
    api.put(SLICES, endpoint_slice("prefill-1", "prefill", *hosts(9)))
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(8)), namespace="other")
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls(1, 2))
        api.put(SLICES, endpoint_slice("decode-2", "decode", *hosts(3)))
        wait_for(lambda: reports.urls == urls(1, 2, 3))
        api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1), ready=False))
        wait_for(lambda: reports.urls == urls(1, 3))
        assert [each.state for each in reports.snapshots[-1]] == [MemberState.NOT_READY, MemberState.READY]
        api.delete(SLICES, "decode-1")
        wait_for(lambda: reports.urls == urls(3))
        api.delete(SLICES, "decode-2")
        wait_for(lambda: reports.urls == set())
    assert reports.failures == []
    assert len(api.lists()) == len(api.watches()) == 1


def test_services_are_selected_by_the_labels_of_their_slices(api: FakeApiServer, tmp_path: Path) -> None:
    """Kubernetes copies the labels of a Service to its slices; a slice whose labels change goes."""
    labelled = endpoint_slice("a-1", "a", *hosts(1))
    labelled["metadata"]["labels"]["sglang.ai/role"] = "decode"
    api.put(SLICES, labelled)
    with watching(api, tmp_path, selector="sglang.ai/role in (decode, both)") as reports:
        wait_for(lambda: reports.urls == urls(1))
        api.put(SLICES, endpoint_slice("a-1", "a", *hosts(1)))
        wait_for(lambda: reports.urls == set())


def test_pods_are_selected_by_labels(api: FakeApiServer, tmp_path: Path) -> None:
    """A pod goes from ready over terminating to gone."""
    labels = {"app": "qwen"}
    with watching(api, tmp_path, pods="app=qwen", group_label="revision") as reports:
        wait_for(lambda: reports.urls == set())
        api.put(PODS, pod("decode-0", "10.0.0.1", labels=labels | {"revision": "r2"}))
        wait_for(lambda: reports.urls == urls(1))
        assert [(each.uid, each.group) for each in reports.snapshots[-1]] == [("uid-decode-0", "r2")]
        api.put(PODS, pod("decode-0", "10.0.0.1", labels=labels, deletionTimestamp="2026-01-01T00:00:00Z"))
        wait_for(lambda: reports.snapshots[-1][0].state is MemberState.TERMINATING)
        api.delete(PODS, "decode-0")
        wait_for(lambda: reports.urls == set())


def test_a_watch_goes_on_from_the_version_of_the_last_bookmark(api: FakeApiServer, tmp_path: Path) -> None:
    """So a break costs no list, however long nothing of this source has changed."""
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1)))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls(1))
        api.put(SLICES, endpoint_slice("prefill-1", "prefill", *hosts(9)))
        bookmark = str(api.version)

        def goes_on_from_the_bookmark() -> bool:
            before = len(api.watches())
            api.cut()
            wait_for(lambda: len(api.watches()) > before)
            return api.watches()[-1].parameters["resourceVersion"] == bookmark

        wait_for(goes_on_from_the_bookmark)
        api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1, 2)))
        wait_for(lambda: reports.urls == urls(1, 2))
    assert len(api.lists()) == 1
    versions = [int(each.parameters["resourceVersion"]) for each in api.watches()]
    assert versions == sorted(versions)
    assert reports.failures == []


@pytest.mark.parametrize("as_status", [False, True], ids=["event", "status"])
def test_a_version_that_is_too_old_leads_to_a_list_of_the_present(
    api: FakeApiServer, tmp_path: Path, as_status: bool
) -> None:
    """What was deleted meanwhile goes, and nothing else."""
    api.gone_as_status = as_status
    for number in (1, 2):
        api.put(SLICES, endpoint_slice(f"decode-{number}", "decode", *hosts(number)))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls(1, 2) and api.watches())
        api.stop()
        wait_for(lambda: reports.is_failing)
        api.delete(SLICES, "decode-1")
        api.put(SLICES, endpoint_slice("decode-3", "decode", *hosts(3)))
        api.compact()
        assert reports.urls == urls(1, 2)
        api.start()
        wait_for(lambda: reports.urls == urls(2, 3))
    assert [each.parameters["resourceVersion"] for each in api.lists()] == ["0", ""]
    assert all("10.0.0.2" in {each.host for each in snapshot} for snapshot in reports.snapshots)


def test_an_api_server_that_is_away_keeps_the_last_members(api: FakeApiServer, tmp_path: Path) -> None:
    """Each try reports a failure; afterwards the members are reported again, and the watch goes on."""
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1)))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls(1) and api.watches())
        api.stop()
        wait_for(lambda: len(reports.failures) > 5)
        before = len(reports.snapshots)
        api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1, 2)))
        assert len(reports.snapshots) == before
        api.start()
        wait_for(lambda: not reports.is_failing)
        wait_for(lambda: reports.urls == urls(1, 2))
    assert "check that the API server is up" in reports.failures[-1]
    assert set.union(*({each.host for each in snapshot} for snapshot in reports.snapshots)) == set(hosts(1, 2))
    assert all(reports.snapshots)


def test_a_silent_watch_is_replaced(api: FakeApiServer, tmp_path: Path) -> None:
    """A firewall may drop a connection without a word to either end."""
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1)))
    with watching(api, tmp_path, replace(FAST, line_timeout=0.5)) as reports:
        wait_for(lambda: reports.urls == urls(1) and api.watches())
        api.silent = True
        api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1, 2)))
        wait_for(lambda: len(api.watches()) > 1)
        api.silent = False
        wait_for(lambda: reports.urls == urls(1, 2))
    assert len(api.lists()) == 1
    assert reports.failures == []


def test_a_watch_that_the_api_server_ends_is_opened_again(api: FakeApiServer, tmp_path: Path) -> None:
    """The API server ends each watch after the time that was asked for; nothing is lost between two."""
    timing = Timing(watch=(1, 1), first_pause=0.02, steady=0.0)
    with watching(api, tmp_path, timing) as reports:
        wait_for(lambda: len(api.watches()) > 2)
        api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1)))
        wait_for(lambda: reports.urls == urls(1))
    assert len(api.lists()) == 1
    assert reports.failures == []


def test_a_watch_that_ends_at_once_is_no_busy_loop(api: FakeApiServer, tmp_path: Path) -> None:
    """Whatever answers there, the pauses grow, and the failure is reported."""
    with watching(api, tmp_path, Timing(watch=(0, 0), first_pause=0.05, longest_pause=0.2)) as reports:
        wait_for(lambda: len(reports.failures) > 2)
        assert "ended at once" in reports.failures[-1]
        assert len(api.watches()) < 40
    assert len(reports.snapshots) == 1  # a watch that only opens ends no failure, so the log does not alternate


def refusal(code: int, reason: str, message: str) -> bytes:
    return json.dumps({"kind": "Status", "code": code, "reason": reason, "message": message}).encode()


@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_is_obeyed(api: FakeApiServer, tmp_path: Path, code: int) -> None:
    """An API server under load sends it with 429, and one that ends with 503."""
    api.refuse = code, {"Retry-After": "1"}, refusal(code, "TooManyRequests", "wait")
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.failures)
        api.refuse = None
        wait_for(lambda: reports.urls == set())
    assert len(api.calls) < 8  # FAST alone would have sent dozens within this second


def test_a_missing_right_is_named_with_the_remedy(api: FakeApiServer, tmp_path: Path) -> None:
    """The rights may be granted while the service runs."""
    api.tokens[TOKEN] = frozenset({"watch"})
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.failures)
        assert 'cannot list resource "endpointslices"' in reports.failures[-1]
        assert "grant the verb list on endpointslices of apiGroups ['discovery.k8s.io']" in reports.failures[-1]
        assert "RoleBinding in namespace llm" in reports.failures[-1]
        api.tokens[TOKEN] = frozenset({"list"})
        wait_for(lambda: "grant the verb watch" in reports.failures[-1])
        assert len(reports.snapshots) == 1
        api.tokens[TOKEN] = frozenset({"list", "watch"})
        wait_for(lambda: not reports.is_failing)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, refusal(400, "BadRequest", "unable to parse")), "as kubectl get --selector takes it"),
        ((404, refusal(404, "NotFound", "no such resource")), "Kubernetes 1.21 or later"),
        ((401, refusal(401, "Unauthorized", "Unauthorized")), "the token is not accepted"),
        ((302, b'"elsewhere"'), "302"),
        ((500, b'{"message": 7}'), "500"),
        ((200, b'{"items": 7}'), "no list of Kubernetes"),
        ((200, b'{"metadata": {}, "items": []}'), "no list of Kubernetes"),
        (
            (200, b'{"metadata": {"resourceVersion": "1"}, "items": [{"metadata": {}, "endpoints": 7}]}'),
            "unexpected form",
        ),
        ((200, b"[" * 5000 + b"]" * 5000), "no list of Kubernetes"),
    ],
)
def test_an_answer_that_cannot_be_used_is_a_failure_with_a_reason(
    api: FakeApiServer, tmp_path: Path, answer: tuple[int, bytes], message: str
) -> None:
    """It ends neither the source nor what is kept."""
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1)))
    code, body = answer
    api.refuse = code, {}, body
    with watching(api, tmp_path) as reports:
        wait_for(lambda: len(reports.failures) > 1)
        assert message in reports.failures[-1]
        api.refuse = None
        wait_for(lambda: reports.urls == urls(1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"garbage\n", "no event of Kubernetes"),
        (b'{"type": "MODIFIED", "object": {"metadata": {"name": "decode-1"}, "endpoints": 7}}\n', "unexpected form"),
        (b'{"type": "MODIFIED", "object": 7}\n', "unexpected form"),
        (b'{"type": "ERROR", "object": {"status": "Failure", "code": 500, "message": "unable to decode"}}\n', "500"),
        (b'{"type": "ERROR", "object": 7}\n', "500"),
    ],
)
def test_a_line_that_cannot_be_used_changes_nothing(
    api: FakeApiServer, tmp_path: Path, line: bytes, message: str
) -> None:
    """The watch is opened again from the last version."""
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1)))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls(1) and api.watches())
        api.send(line)
        wait_for(lambda: reports.failures)
        assert message in reports.failures[0]
        wait_for(lambda: not reports.is_failing)
        api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1, 2)))
        wait_for(lambda: reports.urls == urls(1, 2))
    assert len(api.lists()) == 1
    assert all(reports.snapshots)


def test_a_change_before_a_line_that_cannot_be_used_is_reported(api: FakeApiServer, tmp_path: Path) -> None:
    """Both may arrive at once. The next watch does not have the change again."""
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1)))
    with watching(api, tmp_path, Timing(first_pause=0.02)) as reports:
        wait_for(lambda: reports.urls == urls(1) and api.watches())
        manifest = endpoint_slice("decode-1", "decode", *hosts(2))
        manifest["metadata"]["resourceVersion"] = "1001"
        api.send(json.dumps({"type": "MODIFIED", "object": manifest}).encode() + b'\n{"type": "NEW", "object": 7}\n')
        wait_for(lambda: reports.urls == urls(2))


def test_a_line_may_come_in_pieces_and_with_any_character(api: FakeApiServer, tmp_path: Path) -> None:
    """U+2028 ends a line for some readers, and does not end one of JSON. Blank lines and unknown types are skipped."""
    manifest = endpoint_slice("decode-1", "decode", *hosts(1))
    manifest["metadata"] |= {"resourceVersion": "1001", "annotations": {"note": "a\u2028b"}}
    line = json.dumps({"type": "ADDED", "object": manifest}, ensure_ascii=False).encode() + b"\n"
    assert "\u2028".encode() in line
    with watching(api, tmp_path) as reports:
        wait_for(api.watches)
        api.send(b"\n")
        api.send(b'{"type": "NEW", "object": {"metadata": {"name": "decode-9"}}}\n' + line[:40])
        api.send(line[40:60])
        api.send(line[60:])
        wait_for(lambda: reports.urls == urls(1))
    assert reports.failures == []


def test_a_list_is_read_by_pages(api: FakeApiServer, tmp_path: Path) -> None:
    """A token of a page can be too old like a version; then everything is listed in one piece."""
    for number in range(1, 8):
        api.put(SLICES, endpoint_slice(f"decode-{number}", "decode", *hosts(number)))
    api.largest_page = 3
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls(*range(1, 8)))
    assert [each.parameters.get("continue") for each in api.lists()] == [None, "1007/3", "1007/6"]
    assert [each.parameters.get("resourceVersion") for each in api.lists()] == ["0", None, None]


def test_a_rotated_token_is_read_for_each_request(api: FakeApiServer, tmp_path: Path) -> None:
    """The kubelet replaces the file by another before the token in it expires."""
    token = tmp_path / "token"
    token.write_text("one\n", encoding="utf-8")
    api.tokens = {"one": frozenset({"list", "watch"})}
    environment = kubeconfig(tmp_path, api, tokenFile="token")
    source = KubernetesSource(KubernetesSettings(service="decode"), environment=environment, timing=FAST)
    with reports_of(source) as reports:
        wait_for(api.watches)
        token.write_text("two\n", encoding="utf-8")
        api.tokens = {"two": frozenset({"list", "watch"})}
        api.cut()
        wait_for(lambda: api.calls[-1].token == "two")
        api.tokens = {}
        api.cut()
        wait_for(lambda: reports.is_failing)
        assert "the token is not accepted" in reports.failures[-1]
        token.write_text("\u20ac\n", encoding="utf-8")
        wait_for(lambda: "has is no token" in reports.failures[-1])
        token.unlink()
        wait_for(lambda: f"cannot read {token}" in reports.failures[-1])
        api.tokens = {"three": frozenset({"list", "watch"})}
        token.write_text("three", encoding="utf-8")
        wait_for(lambda: not reports.is_failing)
    assert [one.token for one, other in pairwise(api.calls) if one.token != other.token][:2] == ["one", "two"]


def test_five_hundred_slices_are_one_set(api: FakeApiServer, tmp_path: Path) -> None:
    """Each change is reported at once, and costs no list."""
    for number in range(500):
        api.put(SLICES, endpoint_slice(f"decode-{number}", "decode", *(f"10.1.{number // 250}.{number % 250}",)))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls is not None and len(reports.urls) == 500)
        for number in range(0, 500, 2):
            api.delete(SLICES, f"decode-{number}")
        wait_for(lambda: reports.urls is not None and len(reports.urls) == 250)
    assert len(api.lists()) == 2  # pages
    assert reports.failures == []


def test_a_problem_of_all_objects_is_a_failure_and_of_one_is_a_warning(
    api: FakeApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A Service with the wrong port must not stop what is known of another one."""
    api.put(SLICES, endpoint_slice("decode-1", "decode", *hosts(1)))
    with watching(api, tmp_path, selector="kubernetes.io/service-name", port="grpc") as reports:
        wait_for(lambda: reports.is_failing)
        assert "Service decode: no port is named grpc" in reports.failures[-1]
        other = endpoint_slice("more-1", "more", *hosts(2))
        other["ports"][0]["name"] = "grpc"
        api.put(SLICES, other)
        wait_for(lambda: reports.urls == urls(2))
        api.put(SLICES, other | {"endpoints": endpoint_slice("", "", *hosts(2, 3))["endpoints"]})
        wait_for(lambda: reports.urls == urls(2, 3))
    warnings = [each.getMessage() for each in caplog.records if "no port is named grpc" in each.getMessage()]
    assert len(warnings) == 1


def test_a_source_has_a_name_a_kind_and_a_time_to_keep() -> None:
    """Logs and metrics have the name."""
    source = KubernetesSource(KubernetesSettings.model_validate({"service": "decode", "keep_for": "1m"}))
    assert (str(source), source.kind, source.keep_for) == ("kubernetes service decode", SourceKind.KUBERNETES, 60.0)
    assert str(KubernetesSource(KubernetesSettings(pods="app=x", namespace="llm"))) == "kubernetes pods app=x in llm"
    assert str(KubernetesSource(KubernetesSettings(selector="a=b"))) == "kubernetes services a=b"


def test_versions_that_expire_again_and_again_are_no_busy_loop(api: FakeApiServer, tmp_path: Path) -> None:
    """The first leads to a list at once; then the pauses grow, because each list is work for the API server."""
    api.oldest = 10**9
    with watching(api, tmp_path, Timing(first_pause=0.05, longest_pause=0.2)) as reports:
        wait_for(lambda: len(reports.failures) > 2)
        assert "too old resource version" in reports.failures[-1]
        assert len(api.lists()) < 40
    assert reports.urls == set()
