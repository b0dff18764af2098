"""The pods of an InferencePool as endpoints: the InferencePool is watched, and so are the pods that it selects."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dp_extproc.config.discovery import KubernetesSettings
from dp_extproc.fleet.discovery.kubernetes.faults import Request, fault_of
from dp_extproc.fleet.discovery.kubernetes.objects import Status
from dp_extproc.fleet.discovery.kubernetes.source import KubernetesSource
from fleet.discovery.test_kubernetes_watch import FAST, kubeconfig
from kube_api import PODS, POOLS, FakeApiServer, inference_pool, pod
from patience import wait_for
from source_reports import Reports, reports_of

QWEN = {"app": "qwen3", "tier": "gpu"}


@pytest.fixture
def api() -> Iterator[FakeApiServer]:
    with FakeApiServer(bookmarks=0.02) as running:
        running.put(PODS, pod("one", "10.0.0.1", labels=QWEN))
        running.put(PODS, pod("two", "10.0.0.2", labels=QWEN))
        running.put(PODS, pod("other", "10.0.0.9", labels={"app": "qwen3"}))
        yield running


@contextmanager
def watching(api: FakeApiServer, folder: Path, **settings: Any) -> Iterator[Reports]:
    source = KubernetesSource(
        KubernetesSettings(inference_pool="qwen", **settings), environment=kubeconfig(folder, api), timing=FAST
    )
    with reports_of(source) as reports:
        yield reports


def urls(*places: tuple[int, int]) -> set[str]:
    return {f"http://10.0.0.{number}:{port}" for number, port in places}


def test_every_port_of_every_selected_pod_is_an_endpoint(api: FakeApiServer, tmp_path: Path) -> None:
    """Labels select as a whole, and the ports of the InferencePool count, whatever the pods declare."""
    api.put(POOLS, inference_pool("qwen", QWEN, 8000, 8001))
    api.put(POOLS, inference_pool("another", {"app": "qwen3"}, 9))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls((1, 8000), (1, 8001), (2, 8000), (2, 8001)))
        assert {each.dp_rank for each in reports.snapshots[-1]} == {None}
        api.put(PODS, pod("three", "10.0.0.3", labels=QWEN))
        wait_for(lambda: (reports.urls or set()) >= urls((3, 8000), (3, 8001)))
    assert reports.failures == []
    (first,) = [each for each in api.lists() if each.resource == POOLS]
    assert first.parameters["fieldSelector"] == "metadata.name=qwen"


def test_ports_are_those_of_ranks_if_configured(api: FakeApiServer, tmp_path: Path) -> None:
    """The order in the InferencePool gives the ranks."""
    api.put(POOLS, inference_pool("qwen", QWEN, 8001, 8000))
    with watching(api, tmp_path, ranks_by_port=True) as reports:
        wait_for(lambda: len(reports.urls or ()) == 4)
        assert {(each.port, each.dp_rank) for each in reports.snapshots[-1]} == {(8001, 0), (8000, 1)}


def test_other_pods_are_watched_once_the_pool_selects_others(api: FakeApiServer, tmp_path: Path) -> None:
    """A changed selector and changed ports take effect, in one snapshot."""
    api.put(POOLS, inference_pool("qwen", QWEN, 8000))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls((1, 8000), (2, 8000)))
        api.put(POOLS, inference_pool("qwen", {"app": "qwen3"}, 9000))
        wait_for(lambda: reports.urls == urls((1, 9000), (2, 9000), (9, 9000)))
        assert all(len({each.port for each in members}) == 1 for members in reports.snapshots)


def test_a_missing_pool_is_reported_and_keeps_the_last_endpoints(api: FakeApiServer, tmp_path: Path) -> None:
    """Before it exists, and after it was deleted, the reason is reported; no snapshot takes endpoints away."""
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.is_failing)
        assert "there is no InferencePool qwen; create it" in reports.failures[-1]
        api.put(POOLS, inference_pool("qwen", QWEN, 8000))
        wait_for(lambda: reports.urls == urls((1, 8000), (2, 8000)) and not reports.is_failing)
        api.delete(POOLS, "qwen")
        wait_for(lambda: reports.is_failing)
        assert reports.urls == urls((1, 8000), (2, 8000))


@pytest.mark.parametrize(
    ("labels", "ports", "expected"),
    [({}, (8000,), "write spec.selector.matchLabels"), (QWEN, (), "write spec.targetPorts")],
    ids=["no labels", "no ports"],
)
def test_a_pool_without_labels_or_ports_is_reported(
    api: FakeApiServer, tmp_path: Path, labels: dict[str, str], ports: tuple[int, ...], expected: str
) -> None:
    """An empty selector would stand for every pod of the namespace."""
    api.put(POOLS, inference_pool("qwen", labels, *ports))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.is_failing)
        assert expected in reports.failures[-1]
    assert not [each for each in api.calls if each.resource == PODS]


def test_an_outage_of_the_api_server_ends_without_a_change(api: FakeApiServer, tmp_path: Path) -> None:
    """The endpoints stay, and the failure is over once both watches are open again."""
    api.put(POOLS, inference_pool("qwen", QWEN, 8000))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.urls == urls((1, 8000), (2, 8000)))
        api.stop()
        wait_for(lambda: reports.is_failing)
        api.start()
        wait_for(lambda: not reports.is_failing)
        assert reports.urls == urls((1, 8000), (2, 8000))


def test_the_right_to_read_pools_is_named_if_it_is_missing(api: FakeApiServer, tmp_path: Path) -> None:
    """A role that allows pods alone, as for a source of pods, is not enough."""
    api.tokens = dict.fromkeys(api.tokens, frozenset({"get"}))
    with watching(api, tmp_path) as reports:
        wait_for(lambda: reports.is_failing)
        assert "inferencepools.inference.networking.k8s.io" in reports.failures[-1]


def test_a_cluster_without_inference_pools_needs_their_definitions() -> None:
    """The kind is no part of Kubernetes, so another version of Kubernetes does not help."""
    fault = fault_of(
        404, Status(message="not found"), Request("list", "inferencepools.inference.networking.k8s.io", "llm")
    )

    assert "install version v1 of the Gateway API Inference Extension's CustomResourceDefinitions" in str(fault)
