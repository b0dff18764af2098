"""Writes the objects of a fleet by hand: Services, and pods as a kubelet reports them."""

from dataclasses import dataclass
from typing import Any

from interop.kubernetes.cluster import Cluster

NAMESPACE = "llm"
ACCOUNT = "dp-extproc"
NODE = "node-1"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"


def prepare(cluster: Cluster) -> None:
    """Create namespaces and a node: the controller leaves pods of unknown nodes out."""
    for name in (NAMESPACE, "other"):
        cluster.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    cluster.request("POST", "/api/v1/nodes", {"metadata": {"name": NODE}})


def create_service(cluster: Cluster, name: str, labels: dict[str, str], selector: dict[str, str]) -> None:
    """Create a headless Service with the ports of an engine."""
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    if "prefill" in name:
        ports.append({"name": "bootstrap", "port": 8998, "targetPort": "bootstrap"})
    spec = {"clusterIP": "None", "selector": selector, "ports": ports}
    cluster.request("POST", f"{CORE}/services", {"metadata": {"name": name, "labels": labels}, "spec": spec})


def create_slice(cluster: Cluster, name: str, service: str, address: str, port: int = 30000) -> None:
    """Create a slice by hand, as for engines outside of the cluster."""
    slice_ = {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [address]}],
    }
    cluster.request("POST", SLICES, slice_)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod. Its phases are those of a kubelet that starts and ends an engine."""

    cluster: Cluster
    name: str

    @property
    def path(self) -> str:
        return f"{CORE}/pods/{self.name}"

    def create(self, labels: dict[str, str], port: int, bootstrap_port: int | None = None) -> dict[str, Any]:
        """Create it; it waits for its node."""
        ports = [{"name": "http", "containerPort": port}]
        if bootstrap_port is not None:
            ports.append({"name": "bootstrap", "containerPort": bootstrap_port})
        spec = {
            "nodeName": NODE,
            "serviceAccountName": ACCOUNT,
            "containers": [{"name": "engine", "image": "engine", "ports": ports}],
        }
        metadata = {"name": self.name, "labels": labels}
        return self.cluster.request("POST", f"{CORE}/pods", {"metadata": metadata, "spec": spec})

    def report(self, address: str, *, ready: bool) -> None:
        """Report that its containers run."""
        condition = {"type": "Ready", "status": "True" if ready else "False"}
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [condition]}
        self.cluster.request("PATCH", f"{self.path}/status", {"status": status})

    def terminate(self) -> None:
        """Delete it as a rollout does: it goes on until its grace is over."""
        self.cluster.request("DELETE", self.path, {"gracePeriodSeconds": 60})

    def remove(self) -> None:
        """Report that it has ended."""
        self.cluster.request("DELETE", self.path, {"gracePeriodSeconds": 0})
