"""Runs Kubernetes' own API server, etcd and the controller of EndpointSlices, with data in a temporary directory."""

import base64
import json
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.tied_process import end_process, start_tied

ADMIN_TOKEN = "admin-of-the-run"  # noqa: S105 - of an API server on loopback that lives for minutes
ADDRESS = "10.77.0.1"
"""Address of the API server that it writes into its own Service. It may not be one of loopback."""
_START_SECONDS = 120.0
_STOP_SECONDS = 30.0


class Cluster:
    """A control plane without nodes; a context manager. Pods are written by hand, as a kubelet would."""

    def __init__(self, programs: Path, directory: Path) -> None:
        self.directory = directory
        self._programs = programs
        etcd_port, peer_port, self.port, controller_port = free_ports(4)
        self.url = f"https://127.0.0.1:{self.port}"
        self._etcd_url = f"http://127.0.0.1:{etcd_port}"
        self._peer_url = f"http://127.0.0.1:{peer_port}"
        self._controller_port = controller_port
        self._stack = ExitStack()
        self._api: subprocess.Popen[bytes] | None = None
        self.client = self._stack.enter_context(
            httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {ADMIN_TOKEN}"},
                verify=False,  # noqa: S501 - the service verifies the certificate; this client comes before it exists
                trust_env=False,
                timeout=30,
            )
        )
        self._etcd_client = self._stack.enter_context(httpx.Client(base_url=self._etcd_url, trust_env=False))

    @property
    def ca(self) -> Path:
        """Certificate with which the API server signed its own."""
        return self.directory / "certs" / "apiserver.crt"

    def __enter__(self) -> Self:
        (self.directory / "tokens.csv").write_text(f"{ADMIN_TOKEN},admin,1,system:masters\n", encoding="utf-8")
        key = self.directory / "service-accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        self._start(
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            f"--initial-cluster=default={self._peer_url}",
        )
        self.start_api()
        self._write_kubeconfig(self.directory / "controllers.yaml")
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={self.directory / 'controllers.yaml'}",
            "--controllers=endpointslice-controller",
            "--use-service-account-credentials=false",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._controller_port}",
            f"--cert-dir={self.directory / 'controller-certs'}",
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start_api(self) -> None:
        """Start the API server, and wait until it is ready."""
        key = self.directory / "service-accounts.key"
        self._api = self._start(
            "kube-apiserver",
            f"--etcd-servers={self._etcd_url}",
            f"--cert-dir={self.directory / 'certs'}",
            "--bind-address=127.0.0.1",
            f"--advertise-address={ADDRESS}",
            f"--secure-port={self.port}",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            "--etcd-compaction-interval=0",
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if self._api.poll() is not None or time.monotonic() > deadline:
                log = (self.directory / "kube-apiserver.log").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"kube-apiserver is not ready; {log[-2000:]}")
            time.sleep(0.2)

    def stop_api(self) -> None:
        """End the API server, as an upgrade of the control plane does."""
        assert self._api is not None
        end_process(self._api, _STOP_SECONDS)

    def kill_api(self) -> None:
        """End the API server without a farewell to its clients."""
        assert self._api is not None
        self._api.kill()
        self._api.wait()

    def compact(self) -> int:
        """Remove the whole history from etcd, and return the revision that is left."""
        version = self._etcd_client.post("/v3/kv/range", json={"key": "AA=="}).raise_for_status().json()
        revision = int(version["header"]["revision"])
        answer = self._etcd_client.post("/v3/kv/compaction", json={"revision": str(revision), "physical": True})
        answer.raise_for_status()
        return revision

    def remove_from_etcd(self, key: str) -> int:
        """Delete keys with this prefix behind the back of the API server, and return how many there were."""
        first = base64.b64encode(key.encode()).decode()
        end = base64.b64encode(key[:-1].encode() + bytes([ord(key[-1]) + 1])).decode()
        answer = self._etcd_client.post("/v3/kv/deleterange", json={"key": first, "range_end": end})
        return int(answer.raise_for_status().json().get("deleted", 0))

    def request(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send one request of the administrator, and return the answer."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        body = None if content is None else json.dumps(content)
        answer = self.client.request(method, path, content=body, headers={"Content-Type": kind})
        if answer.is_error:
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text}")
        found: dict[str, Any] = answer.json()
        return found

    def path_of(self, manifest: Mapping[str, Any]) -> str | None:
        """Return the path of an object; None if the API server does not have its kind."""
        version = manifest["apiVersion"]
        base = f"/apis/{version}" if "/" in version else f"/api/{version}"
        answer = self.client.get(base)
        kinds = answer.json()["resources"] if answer.is_success else ()
        found = next((each for each in kinds if each["kind"] == manifest["kind"]), None)
        if found is None:
            return None
        meta = manifest["metadata"]
        scope = f"namespaces/{meta['namespace']}/" if found["namespaced"] else ""
        return f"{base}/{scope}{found['name']}/{meta['name']}"

    def apply(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> None:
        """Create or replace one object by server-side apply, or only let the API server check it."""
        path = self.path_of(manifest)
        assert path is not None, manifest
        answer = self.client.patch(
            path,
            params={"fieldManager": "run", "force": "true", "fieldValidation": "Strict"}
            | ({"dryRun": "All"} if dry_run else {}),
            content=json.dumps(manifest),
            headers={"Content-Type": "application/apply-patch+yaml"},
        )
        if answer.is_error:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text}")

    def token(self, namespace: str, account: str, pod: dict[str, Any]) -> str:
        """Issue a token as a kubelet mounts it: it is bound to a pod and not valid any more when the pod is gone."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        bound = {"kind": "Pod", "apiVersion": "v1", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        answer = self.request("POST", path, {"spec": {"expirationSeconds": 3600, "boundObjectRef": bound}})
        issued: str = answer["status"]["token"]
        return issued

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/readyz", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def _start(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        command = [str(self._programs / program), *options]
        log = self._stack.enter_context((self.directory / f"{program}.log").open("ab"))
        process = start_tied(command, log, log)
        self._stack.callback(end_process, process, _STOP_SECONDS)
        return process

    def _write_kubeconfig(self, path: Path) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "run", "cluster": {"server": self.url, "certificate-authority": str(self.ca)}}],
            "users": [{"name": "admin", "user": {"token": ADMIN_TOKEN}}],
            "contexts": [{"name": "run", "context": {"cluster": "run", "user": "admin"}}],
            "current-context": "run",
        }
        path.write_text(json.dumps(config), encoding="utf-8")
