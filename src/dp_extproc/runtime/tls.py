"""Server credentials of gRPC whose files may be replaced while the service runs."""

import logging
from pathlib import Path
from typing import Any

import grpc

from dp_extproc.config import ServerTls
from dp_extproc.runtime.secrets import problems_of_tls

_log = logging.getLogger(__name__)


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Make the credentials. gRPC asks for the files' contents at every handshake.

    Files that do not belong together, as while they are being replaced, are left until they do.

    Raises:
        OSError: A file cannot be read.
    """
    first = _signature(tls)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls), _Fetcher(tls, first), require_client_authentication=tls.client_ca is not None
    )


class _Fetcher:
    """Gives gRPC a new configuration once the files have changed; None means that the present one stays."""

    def __init__(self, tls: ServerTls, seen: object) -> None:
        self._tls = tls
        self._seen = seen

    def __call__(self) -> Any:
        try:
            now = _signature(self._tls)
            if now == self._seen:
                return None
            self._seen = now
            if problems := list(problems_of_tls(self._tls)):
                _log.error("TLS: the files have changed, but stay unused: %s", "; ".join(map(str, problems)))
                return None
            renewed = _configuration(self._tls)
        except OSError as error:
            _log.error("TLS: the files have changed, but cannot be read: %s", error)
            return None
        _log.info("TLS: new connections get the new certificate of %s", self._tls.cert)
        return renewed


def _signature(tls: ServerTls) -> tuple[tuple[int, int, int], ...]:
    """Tell one state of the files from another. Kubernetes replaces the target of a link, so links are followed."""
    stats = [Path(path).stat() for path in tls.files.values()]
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)


def _configuration(tls: ServerTls) -> Any:
    key, cert = Path(tls.key).read_bytes(), Path(tls.cert).read_bytes()
    roots = None if tls.client_ca is None else Path(tls.client_ca).read_bytes()
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=roots)
