"""TLS of Envoy's listener for clients, and of its clusters.

Envoy reads certificates at its start, or follows them if they are secrets (SDS). With ``envoy.secrets`` each secret is
a printed file that names the files of a certificate. Envoy reads all of them again when something is moved into their
directory, as Kubernetes does with the files of a volume.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from betterproto2 import Message
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as tls
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from msgspec import Struct

from dp_extproc.config import Config
from dp_extproc.config.security import EngineTlsOfEnvoy, SdsSettings, is_uri
from dp_extproc.envoy_config.yaml_text import pack, render_yaml


class Identity(Struct, frozen=True):
    """What one side of TLS presents, and what it requires of the other side."""

    name: str
    """Beginning of the names of its secrets."""
    alpn: Sequence[str]
    ca: str | None
    names: Sequence[str] = ()
    """The other side's certificate must have one of these DNS names or URIs. None stands for any name."""
    cert: str | None = None
    key: str | None = None


def transport_socket(name: str, settings: Message) -> core.TransportSocket:
    """Build one of the transport sockets that are part of Envoy."""
    return core.TransportSocket(name=f"envoy.transport_sockets.{name}", typed_config=pack(settings))


def to_service_tls(config: Config) -> core.TransportSocket | None:
    """Build the transport socket of the clusters of the service; None for plain HTTP/2.

    Envoy dials the processes by IP address, and no certificate can list all of these. Therefore every process has a
    certificate for one common name, and Envoy verifies that name.
    """
    settings, identity = config.envoy.service_tls, _of_service(config)
    if settings is None or identity is None:
        return None
    common = common_context(identity, config.envoy.secrets)
    return transport_socket("tls", tls.UpstreamTlsContext(sni=settings.name, common_tls_context=common))


def to_engines_tls(config: Config) -> core.TransportSocket | None:
    """Build the transport socket of the clusters that dial engines; None for plain HTTP."""
    settings, identity, sds = config.engine_tls, _of_engines(config), _sds(config)
    if settings is None or identity is None:
        return None
    common = common_context(identity, config.envoy.secrets) if sds is None else _served_context(identity, sds)
    return transport_socket("tls", tls.UpstreamTlsContext(sni=settings.sent_name or "", common_tls_context=common))


def for_clients(config: Config) -> core.TransportSocket | None:
    """Build the transport socket of the listener for clients; None for plain HTTP."""
    identity = _for_clients(config)
    if identity is None:
        return None
    common = common_context(identity, config.envoy.secrets)
    context = tls.DownstreamTlsContext(common_tls_context=common)
    if identity.ca is not None:
        context.require_client_certificate = True
    return transport_socket("tls", context)


def secret_files(config: Config) -> Mapping[str, str]:
    """Return the files for the directory ``envoy.secrets``, by name."""
    if config.envoy.secrets is None:
        return {}
    engines = _of_engines(config) if _sds(config) is None else None
    identities = (_for_clients(config), _of_service(config), engines)
    secrets = (secret for identity in identities if identity is not None for secret in _secrets(identity))
    return {_file_of(each.name): render_yaml(DiscoveryResponse(resources=[pack(each)])) for each in secrets}


def common_context(identity: Identity, directory: str | None) -> tls.CommonTlsContext:
    """Build what listeners and clusters have in common.

    *directory* is that of the secrets. None stands for files that Envoy reads at its start.
    """
    certificate, validation = _certificate(identity), _validation(identity)
    context = tls.CommonTlsContext(alpn_protocols=list(identity.alpn))
    if directory is None:
        context.tls_certificates = [] if certificate is None else [certificate]
        context.validation_context = validation
        return context
    for secret in _secrets(identity):
        path = core.PathConfigSource(path=str(PurePosixPath(directory, _file_of(secret.name))))
        source = core.ConfigSource(path_config_source=path, resource_api_version=core.ApiVersion.V3)
        followed = tls.SdsSecretConfig(name=secret.name, sds_config=source)
        if secret.tls_certificate is None:
            context.validation_context_sds_secret_config = followed
        else:
            context.tls_certificate_sds_secret_configs = [followed]
    return context


def _served_context(identity: Identity, sds: SdsSettings) -> tls.CommonTlsContext:
    """Build a context whose certificates another program serves."""
    to_program = core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=sds.cluster))
    api = core.ApiConfigSource(
        api_type=core.ApiConfigSourceApiType.GRPC, transport_api_version=core.ApiVersion.V3, grpc_services=[to_program]
    )
    source = core.ConfigSource(api_config_source=api, resource_api_version=core.ApiVersion.V3)
    names = tls.CertificateValidationContext(match_typed_subject_alt_names=_matchers(identity.names))
    own = [] if sds.certificate is None else [tls.SdsSecretConfig(name=sds.certificate, sds_config=source)]
    return tls.CommonTlsContext(
        alpn_protocols=list(identity.alpn),
        tls_certificate_sds_secret_configs=own,
        combined_validation_context=tls.CommonTlsContextCombinedCertificateValidationContext(
            default_validation_context=names,
            validation_context_sds_secret_config=tls.SdsSecretConfig(name=sds.ca, sds_config=source),
        ),
    )


def _for_clients(config: Config) -> Identity | None:
    settings = config.envoy.tls
    if settings is None:
        return None
    name = f"{config.envoy.name_prefix}front-door"
    return Identity(name, ["h2", "http/1.1"], settings.client_ca, (), settings.cert, settings.key)


def _of_service(config: Config) -> Identity | None:
    settings = config.envoy.service_tls
    if settings is None:
        return None
    name = f"{config.envoy.name_prefix}service"
    return Identity(name, ["h2"], settings.ca, [settings.name], settings.cert, settings.key)


def _sds(config: Config) -> SdsSettings | None:
    return None if config.envoy.engine_tls is None else config.envoy.engine_tls.sds


def _of_engines(config: Config) -> Identity | None:
    settings, files = config.engine_tls, config.envoy.engine_tls or EngineTlsOfEnvoy()
    if settings is None:
        return None
    cert, key = (settings.cert, settings.key) if files.cert is None else (files.cert, files.key)
    name = f"{config.envoy.name_prefix}engines"
    return Identity(name, ["http/1.1"], files.ca or settings.ca, settings.names, cert, key)


def _secrets(identity: Identity) -> Iterator[tls.Secret]:
    """List the secrets of an identity, each with the directory that Envoy watches."""
    if (certificate := _certificate(identity)) is not None:
        certificate.watched_directory = _directory_of(certificate.certificate_chain)
        yield tls.Secret(name=f"{identity.name}-certificate", tls_certificate=certificate)
    if (validation := _validation(identity)) is not None:
        validation.watched_directory = _directory_of(validation.trusted_ca)
        yield tls.Secret(name=f"{identity.name}-ca", validation_context=validation)


def _file_of(secret: str) -> str:
    return f"secret-{secret}.yaml"


def _directory_of(file: core.DataSource | None) -> core.WatchedDirectory:
    return core.WatchedDirectory(path=str(PurePosixPath("" if file is None else file.filename or "").parent))


def _certificate(identity: Identity) -> tls.TlsCertificate | None:
    if identity.cert is None or identity.key is None:
        return None
    chain, key = core.DataSource(filename=identity.cert), core.DataSource(filename=identity.key)
    return tls.TlsCertificate(certificate_chain=chain, private_key=key)


def _validation(identity: Identity) -> tls.CertificateValidationContext | None:
    if identity.ca is None:
        return None
    return tls.CertificateValidationContext(
        trusted_ca=core.DataSource(filename=identity.ca), match_typed_subject_alt_names=_matchers(identity.names)
    )


def _matchers(names: Sequence[str]) -> list[tls.SubjectAltNameMatcher]:
    kinds = tls.SubjectAltNameMatcherSanType
    return [
        tls.SubjectAltNameMatcher(san_type=kinds.URI if is_uri(name) else kinds.DNS, matcher=StringMatcher(exact=name))
        for name in names
    ]
