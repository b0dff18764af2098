"""TLS from Envoy to the service."""

from envoy_data_plane.envoy.config.core.v3 import DataSource, TransportSocket
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    CommonTlsContext,
    SubjectAltNameMatcher,
    SubjectAltNameMatcherSanType,
    TlsCertificate,
    UpstreamTlsContext,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from dp_extproc.config import ServiceTls


def speak_tls(settings: ServiceTls | None) -> TransportSocket | None:
    """Build the transport socket of a cluster of the service; None for plain HTTP/2.

    Processes are dialled by IP, the owner of a request even by one that no certificate can know; so all of them have
    certificates for one name, and that is what is verified.
    """
    if settings is None:
        return None
    certificates = []
    if settings.cert is not None and settings.key is not None:
        certificates = [
            TlsCertificate(
                certificate_chain=DataSource(filename=settings.cert), private_key=DataSource(filename=settings.key)
            )
        ]
    name = SubjectAltNameMatcher(san_type=SubjectAltNameMatcherSanType.DNS, matcher=StringMatcher(exact=settings.name))
    context = CommonTlsContext(
        alpn_protocols=["h2"],
        tls_certificates=certificates,
        validation_context=CertificateValidationContext(
            trusted_ca=DataSource(filename=settings.ca), match_typed_subject_alt_names=[name]
        ),
    )
    tls = UpstreamTlsContext(sni=settings.name, common_tls_context=context)
    return TransportSocket(name="envoy.transport_sockets.tls", typed_config=Any.pack(tls))
