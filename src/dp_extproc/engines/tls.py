"""TLS to engines: a context that follows its files, and the names that a certificate must have one of.

1. Envoy and the service dial engines by IP address, and no certificate can list all of these. Therefore a certificate
   is verified for the configured names.
2. A name may be a URI, such as a SPIFFE ID, which OpenSSL does not compare. So names are compared here, for each kind.
"""

import ssl
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

from dp_extproc.config.security import is_uri

_BY_CERTIFICATE: Final = "compare engine_tls.ca and engine_tls.names with its certificate"
_BY_PROTOCOL: Final = "it seems not to speak TLS; compare with how the engine was started"
_BY_CLIENT: Final = "the engine refuses the certificate of its client; compare engine_tls.cert with its client CA"
_BY_SETTINGS: Final = "the engine refuses the connection; compare engine_tls.sni and its versions of TLS"
_OF_CERTIFICATES: Final = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED")
"""Parts of the names of alerts about a certificate. With TLS 1.2 a missing one is a failure of the handshake."""


class TlsContext(ssl.SSLContext):
    """The context of every connection to an engine. New connections use the certificates that were set last.

    It is an ``ssl.SSLContext`` of its own, so that an HTTP client can keep it. It sets the SNI itself, whatever the
    client passes. Before :meth:`use` it trusts no certificate.
    """

    _present: ssl.SSLContext | None = None
    _sni: str | None = None

    def __new__(cls) -> Self:
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def use(self, present: ssl.SSLContext, sni: str | None) -> None:
        """Use another context for new connections."""
        self._present, self._sni = present, sni

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *_: Any, **__: Any) -> ssl.SSLObject:
        """Begin a connection. The name that the HTTP client passes is an address, so it is not used."""
        if self._present is None:
            return super().wrap_bio(incoming, outgoing, server_hostname="no-certificates.invalid")
        return self._present.wrap_bio(incoming, outgoing, server_hostname=self._sni)


def named_peer(names: tuple[str, ...]) -> type[ssl.SSLObject]:
    """Make the ``sslobject_class`` of a context that verifies names."""

    class NamedPeer(ssl.SSLObject):
        """A connection whose handshake fails unless the peer's certificate has one of the names."""

        def do_handshake(self) -> None:
            super().do_handshake()
            certificate = self.getpeercert() or {}
            if not has_name(certificate, names):
                found = ", ".join(_names_of(certificate)) or "no name"
                wanted = " or ".join(names)
                raise ssl.SSLCertVerificationError(1, f"the certificate is for {found}, and not for {wanted}")

    return NamedPeer


def has_name(certificate: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Return whether a certificate has one of some names. The first label of its DNS names may be ``*``."""
    uris, domains = set(_names_of(certificate, "URI")), {name.lower() for name in _names_of(certificate, "DNS")}
    for name in names:
        if is_uri(name):
            if name in uris:
                return True
        elif {name.lower(), f"*.{name.lower().partition('.')[2]}"} & domains:
            return True
    return False


def _names_of(certificate: Mapping[str, Any], *kinds: str) -> list[str]:
    found: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())
    return [name for kind, name in found if not kinds or kind in kinds]


def refusal_of(error: BaseException | None) -> str | None:
    """Explain a failed TLS connection, with the remedy; None if the error has another cause."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            detail = getattr(error, "verify_message", None) or error.strerror or str(error)
            return f"TLS failed: {detail}; {_BY_CERTIFICATE}"
        reason = getattr(error, "reason", None)
        if isinstance(error, ssl.SSLError) and reason:
            if "ALERT" not in reason and "UNRECOGNIZED_NAME" not in reason:
                remedy = _BY_PROTOCOL
            else:
                remedy = _BY_CLIENT if any(part in reason for part in _OF_CERTIFICATES) else _BY_SETTINGS
            return f"TLS failed: {reason.replace('_', ' ').lower()}; {remedy}"
        error = error.__cause__ or error.__context__
    return None
