"""Finds the API server and the credentials for it: KUBECONFIG, else the service account of a pod, else ~/.kube/config.

Everything is read anew after each failure, and a token for each request. So rotated tokens and certificates need no
restart.
"""

import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dp_extproc.engines.model import in_url
from dp_extproc.fleet.discovery.kubernetes.kubeconfig import (
    AccessError,
    ClusterEntry,
    UserEntry,
    current_context,
    decoded,
)

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet mounts the credentials of a pod."""


@dataclass(frozen=True, slots=True)
class Access:
    """How requests reach an API server."""

    url: str
    namespace: str
    """The namespace of the pod or of the kubeconfig."""
    token: str = ""
    token_file: Path | None = None
    """File with the token. The kubelet replaces it before the token expires."""
    tls: ssl.SSLContext | None = None
    """None for plain HTTP."""
    tls_name: str | None = None
    """Name in the certificate of the API server, if it is not that of the URL."""
    proxy: str | None = None

    def headers(self) -> dict[str, str]:
        """Return the headers of the next request, with the present token.

        Raises:
            AccessError: The token cannot be read.
        """
        token = self.token
        if self.token_file is not None:
            token = _read(self.token_file).strip()
        if not token.isascii() or not token.isprintable():
            raise AccessError(f"what {self.token_file or 'the kubeconfig'} has is no token; write another one")
        return {"Authorization": f"Bearer {token}"} if token else {}


def find_access(environment: Mapping[str, str], account: Path = SERVICE_ACCOUNT) -> Access:
    """Find the API server.

    Raises:
        AccessError: There is none, or its credentials cannot be read.
    """
    if paths := [Path(each).expanduser() for each in environment.get("KUBECONFIG", "").split(":") if each]:
        return _from_kubeconfig(paths)
    service = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if service[0]:
        return _from_pod(service[0], service[1], account)
    default = Path(environment.get("HOME", "/")) / ".kube" / "config"
    if default.is_file():
        return _from_kubeconfig([default])
    raise AccessError("no API server is configured; run in a pod of the cluster, or name a kubeconfig in KUBECONFIG")


def _from_pod(address: str, port: str, account: Path) -> Access:
    token = account / "token"
    if not token.is_file():
        raise AccessError(
            f"{token} does not exist; set automountServiceAccountToken: true, or mount a projected token there"
        )
    try:
        tls = _tls_context(cafile=account / "ca.crt")
    except (OSError, ssl.SSLError) as error:
        raise AccessError(f"{account / 'ca.crt'}: {error}; check what is mounted there") from None
    url = f"https://{in_url(address)}:{port}"
    return Access(url=url, namespace=_read(account / "namespace").strip(), token_file=token, tls=tls)


def _from_kubeconfig(paths: list[Path]) -> Access:
    context, cluster, user = current_context([(each, _read(each)) for each in paths])
    try:
        tls = _tls(cluster, user) if cluster.server.startswith("https://") else None
    except (OSError, ssl.SSLError) as error:
        names = ", ".join(map(str, paths))
        raise AccessError(f"{names}: cannot load its certificates ({error}); check their paths") from None
    return Access(
        url=cluster.server.rstrip("/"),
        namespace=context.namespace or "default",
        token=user.token,
        token_file=Path(user.token_file) if user.token_file else None,
        tls=tls,
        tls_name=cluster.tls_server_name or None,
        proxy=cluster.proxy_url or None,
    )


def _tls_context(cafile: Path | None, cadata: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=cafile, cadata=cadata)
    # Python 3.13 sets this flag, which refuses an authority without key identifiers. Many clusters have such an
    # authority, above all on EKS, and kubectl accepts it. All other verification stays.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _tls(cluster: ClusterEntry, user: UserEntry) -> ssl.SSLContext:
    authorities = None
    if cluster.certificate_authority_data:
        authorities = decoded(cluster.certificate_authority_data, "certificate-authority-data").decode(
            "ascii", "replace"
        )
    file = Path(cluster.certificate_authority) if cluster.certificate_authority and not authorities else None
    context = _tls_context(file, authorities)
    if cluster.insecure_skip_tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    with tempfile.TemporaryDirectory() as scratch:  # ssl reads a certificate and its key from files alone
        certificate, key = Path(user.client_certificate), Path(user.client_key)
        if user.client_certificate_data:
            certificate = Path(scratch) / "certificate"
            certificate.write_bytes(decoded(user.client_certificate_data, "client-certificate-data"))
        if user.client_key_data:
            key = Path(scratch) / "key"
            key.write_bytes(decoded(user.client_key_data, "client-key-data"))
        if user.client_certificate or user.client_certificate_data:
            context.load_cert_chain(certificate, key)
    return context


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"cannot read {path} ({error}); check that it is mounted, and its permissions") from None
