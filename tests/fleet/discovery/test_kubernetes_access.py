"""How the Kubernetes source finds its API server: in a pod, by kubeconfig files, and what is refused with a remedy."""

import base64
import json
import os
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dp_extproc.config.discovery import KubernetesSettings
from dp_extproc.fleet.discovery.kubernetes.access import Access, find_access
from dp_extproc.fleet.discovery.kubernetes.kubeconfig import AccessError
from dp_extproc.fleet.discovery.kubernetes.reflector import Timing
from dp_extproc.fleet.discovery.kubernetes.source import KubernetesSource
from kube_api import SLICES, TOKEN, FakeApiServer, endpoint_slice
from patience import wait_for
from source_reports import reports_of


def make_certificate(folder: Path, name: str, *options: str) -> tuple[Path, Path]:
    """Write a certificate for 127.0.0.1 that is its own authority, and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    new: list[str | Path] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    new += ["-keyout", key, "-out", certificate]
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:kubernetes"]
    subprocess.run(["openssl", "req", "-x509", "-days", "2", *new, *names, *options], check=True, capture_output=True)
    return certificate, key


def tls_of(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def mount_account(folder: Path, ca: Path) -> Path:
    """Write what a kubelet mounts into a pod."""
    (folder / "token").write_text(f"{TOKEN}\n", encoding="utf-8")
    (folder / "namespace").write_text("llm", encoding="utf-8")
    (folder / "ca.crt").write_bytes(ca.read_bytes())
    return folder


def write_kubeconfig(path: Path, user: dict[str, Any], **cluster: Any) -> str:
    content = {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:6443"} | cluster}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_a_pod_uses_its_service_account_and_a_renewed_authority(tmp_path: Path) -> None:
    """The certificate of the API server is verified. Proxies of the environment do not count."""
    old, new = (make_certificate(tmp_path, name) for name in ("old", "new"))
    account = mount_account(tmp_path, old[0])
    with FakeApiServer(tls=tls_of(*old)) as api:
        api.put(SLICES, endpoint_slice("decode-1", "decode", "10.0.0.1"))
        environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port)}
        environment |= {"HTTPS_PROXY": "http://127.0.0.1:9"}
        timing = Timing(first_pause=0.02, longest_pause=0.1, steady=0.0)
        settings = KubernetesSettings(service="decode")
        source = KubernetesSource(settings, environment=environment, account=account, timing=timing)
        with reports_of(source) as reports:
            wait_for(lambda: reports.urls == {"http://10.0.0.1:30000"} and api.watches())
            assert {each.token for each in api.calls} == {TOKEN}
            api.stop()
            api.tls = tls_of(*new)
            api.start()
            wait_for(lambda: reports.is_failing and "its certificate is not trusted" in reports.failures[-1])
            mount_account(tmp_path, new[0])
            wait_for(lambda: not reports.is_failing)


def test_a_pod_without_access_is_a_failure_with_a_remedy(tmp_path: Path) -> None:
    """The source goes on trying, because a volume may be mounted late."""
    source = KubernetesSource(
        KubernetesSettings(service="decode"),
        environment={"KUBERNETES_SERVICE_HOST": "127.0.0.1"},
        account=tmp_path,
        timing=Timing(first_pause=0.02, longest_pause=0.1),
    )
    with reports_of(source) as reports:
        wait_for(lambda: len(reports.failures) > 1)
    assert "automountServiceAccountToken: true" in reports.failures[-1]


def test_an_ipv6_address_of_the_api_server_is_in_brackets(tmp_path: Path) -> None:
    """Kubernetes sets it without brackets."""
    account = mount_account(tmp_path, make_certificate(tmp_path, "ca")[0])
    access = find_access({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}, account)
    assert (access.url, access.namespace) == ("https://[fd00::1]:6443", "llm")
    assert access.headers() == {"Authorization": f"Bearer {TOKEN}"}


def test_a_kubeconfig_counts_before_the_pod_and_the_home(tmp_path: Path) -> None:
    """KUBECONFIG is explicit. ``~/.kube/config`` is for whoever runs the service outside of a cluster."""
    kubeconfig = write_kubeconfig(tmp_path / "k", {"token": "a"}, server="http://127.0.0.1:8001/")
    pod = {"KUBERNETES_SERVICE_HOST": "127.0.0.1"}
    assert find_access({"KUBECONFIG": kubeconfig, **pod}) == Access("http://127.0.0.1:8001", "default", token="a")
    (tmp_path / ".kube").mkdir()
    write_kubeconfig(tmp_path / ".kube" / "config", {})
    found = find_access({"HOME": str(tmp_path)})
    assert (found.url, found.headers()) == ("https://127.0.0.1:6443", {})
    with pytest.raises(AccessError, match="KUBECONFIG"):
        find_access({"HOME": str(tmp_path / "empty")})


def test_kubeconfigs_are_merged_by_name(tmp_path: Path) -> None:
    """As kubectl does: what the first file has counts."""
    user = tmp_path / "user"
    user.write_text("users: [{name: u, user: {token: of-the-first}}]\n", encoding="utf-8")
    rest = write_kubeconfig(tmp_path / "rest", {"token": "of-the-second"})
    access = find_access({"KUBECONFIG": os.pathsep.join([str(user), rest])})
    assert access.headers() == {"Authorization": "Bearer of-the-first"}


def test_a_path_of_a_kubeconfig_is_relative_to_its_own_file(tmp_path: Path) -> None:
    """As for kubectl: the first of several files need not be the one with the credentials."""
    first = tmp_path / "first"
    first.write_text("current-context: x\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "token").write_text("of-the-folder", encoding="utf-8")
    second = write_kubeconfig(tmp_path / "folder" / "second", {"tokenFile": "token"})
    access = find_access({"KUBECONFIG": os.pathsep.join([str(first), second])})
    assert access.headers() == {"Authorization": "Bearer of-the-folder"}


@pytest.mark.parametrize("inline", [False, True], ids=["paths", "data"])
def test_certificates_of_a_kubeconfig_are_paths_or_data(tmp_path: Path, inline: bool) -> None:
    """The API server asks for the certificate of a client, and verifies it. The name of its own is not its address."""
    certificate, key = make_certificate(tmp_path, "both")
    tls = tls_of(certificate, key)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(certificate)
    with FakeApiServer(tls=tls, tokens={"": frozenset({"list", "watch"})}) as api:
        files = {"certificate-authority": certificate, "client-certificate": certificate, "client-key": key}
        entries: dict[str, str] = {name: path.name for name, path in files.items()}
        if inline:
            entries = {
                f"{name}-data": base64.b64encode(path.read_bytes()).decode("ascii") for name, path in files.items()
            }
        cluster = {name: value for name, value in entries.items() if name.startswith("certificate")}
        user = {name: value for name, value in entries.items() if name.startswith("client")}
        kubeconfig = write_kubeconfig(
            tmp_path / "k", user, server=api.url, **cluster, **{"tls-server-name": "kubernetes"}
        )
        source = KubernetesSource(
            KubernetesSettings(service="d", namespace="llm"), environment={"KUBECONFIG": kubeconfig}
        )
        with reports_of(source) as reports:
            wait_for(lambda: reports.urls == set())
        assert reports.failures == []


def test_an_authority_without_key_identifiers_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old clusters have one. Python 3.13 refuses it by default, and kubectl does not."""
    default = ssl.create_default_context

    def strict(**arguments: Any) -> ssl.SSLContext:
        context = default(**arguments)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    none = ["-addext", "subjectKeyIdentifier=none", "-addext", "authorityKeyIdentifier=none"]
    certificate, key = make_certificate(tmp_path, "old", *none)
    environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1"}
    account = mount_account(tmp_path, certificate)
    kubeconfig = write_kubeconfig(tmp_path / "k", {}, **{"certificate-authority": "ca.crt"})
    with FakeApiServer(tls=tls_of(certificate, key)) as api:
        for access in (find_access(environment, account), find_access({"KUBECONFIG": kubeconfig})):
            assert access.tls is not None
            assert access.tls.verify_mode is ssl.CERT_REQUIRED
            with socket.create_connection(("127.0.0.1", api.port)) as plain:
                access.tls.wrap_socket(plain, server_hostname="127.0.0.1").close()


def test_a_certificate_is_not_verified_on_request(tmp_path: Path) -> None:
    """``insecure-skip-tls-verify`` is for a test cluster."""
    access = find_access({"KUBECONFIG": write_kubeconfig(tmp_path / "k", {}, **{"insecure-skip-tls-verify": True})})
    assert access.tls is not None
    assert access.tls.verify_mode is ssl.CERT_NONE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no context is selected; run kubectl config use-context"),
        ("[]", "is no kubeconfig"),
        ("{", "is no kubeconfig"),
        ("current-context: x", "there is no context x"),
        ("{current-context: x, contexts: [{name: x, context: {cluster: c}}]}", "no cluster with an address"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_refused_with_a_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "k"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(AccessError, match=message):
        find_access({"KUBECONFIG": str(path)})


@pytest.mark.parametrize(
    ("user", "cluster", "message"),
    [
        ({"exec": {"command": "aws"}}, {}, "kubectl create token"),
        ({"auth-provider": {"name": "gcp"}}, {}, "kubectl proxy"),
        ({"username": "a", "password": "b"}, {}, "signs in by username"),
        ({}, {"certificate-authority": "missing"}, "check their paths"),
        ({}, {"certificate-authority-data": "%"}, "is no base64"),
        ({"client-certificate": "missing"}, {}, "check their paths"),
    ],
)
def test_credentials_that_are_not_supported_are_refused_with_a_remedy(
    tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], message: str
) -> None:
    """The service runs no programs of a kubeconfig."""
    with pytest.raises(AccessError, match=message):
        find_access({"KUBECONFIG": write_kubeconfig(tmp_path / "k", user, **cluster)})


@pytest.mark.parametrize(
    ("user", "cluster", "message"),
    [
        ({}, {"proxy-url": "socks5://127.0.0.1:1"}, "write an HTTP proxy as proxy-url"),
        ({}, {"proxy-url": "nonsense"}, "write an HTTP proxy as proxy-url"),
        ({}, {"server": "https://a b"}, "list endpointslices at https://a b"),
        ({}, {"server": "http://[::1"}, "list endpointslices at http://[::1"),
        ({}, {"tls-server-name": ".x"}, "list endpointslices at"),
        ({"token": "a\nb"}, {}, "is no token"),
        ({"token": "\u20ac"}, {}, "is no token"),
    ],
)
def test_values_that_cannot_be_used_are_failures(
    tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], message: str
) -> None:
    """No mistake in a kubeconfig ends the source."""
    with FakeApiServer(tls=tls_of(*make_certificate(tmp_path, "ca"))) as api:
        keys = {"server": api.url, "insecure-skip-tls-verify": True} | cluster
        environment = {"KUBECONFIG": write_kubeconfig(tmp_path / "k", user, **keys)}
        timing = Timing(first_pause=0.02, longest_pause=0.1)
        settings = KubernetesSettings(service="decode")
        with reports_of(KubernetesSource(settings, environment=environment, timing=timing)) as reports:
            wait_for(lambda: len(reports.failures) > 1)
    assert message in reports.failures[-1]


def test_a_kubeconfig_that_is_missing_is_refused(tmp_path: Path) -> None:
    """Whoever names a file means it."""
    with pytest.raises(AccessError, match="cannot read"):
        find_access({"KUBECONFIG": str(tmp_path / "missing")})
    with pytest.raises(AccessError, match="KUBECONFIG"):
        find_access({"KUBECONFIG": ":"})
