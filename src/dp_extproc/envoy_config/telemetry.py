"""What Envoy reports about requests: access logs and spans, and the collectors that get them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from envoy_data_plane.envoy.config.accesslog.v3 import AccessLog, AccessLogFilter
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.trace.v3 import OpenTelemetryConfig, TracingHttp
from envoy_data_plane.envoy.extensions.access_loggers.file.v3 import FileAccessLog
from envoy_data_plane.envoy.extensions.access_loggers.grpc import v3 as als
from envoy_data_plane.envoy.extensions.access_loggers.open_telemetry.v3 import OpenTelemetryAccessLogConfig
from envoy_data_plane.envoy.extensions.access_loggers.stream.v3 import StdoutAccessLog
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
from envoy_data_plane.envoy.extensions.request_id.uuid.v3 import UuidRequestIdConfig
from envoy_data_plane.envoy.extensions.tracers.opentelemetry.samplers import v3 as samplers
from envoy_data_plane.envoy.type.metadata import v3 as metadata
from envoy_data_plane.envoy.type.tracing import v3 as tracing
from envoy_data_plane.envoy.type.v3 import FractionalPercent, FractionalPercentDenominatorType
from envoy_data_plane.google.protobuf import Struct
from envoy_data_plane.opentelemetry.proto.common import v1 as otel

from dp_extproc.config import Config
from dp_extproc.contract import METADATA_NAMESPACE
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.yaml_text import commented, pack

_MILLION: Final = 1_000_000
"""Denominator of the share of sampled traces."""


def access_logs(config: Config, fields: Mapping[str, str], only: AccessLogFilter | None = None) -> list[AccessLog]:
    """Build the access logs of a listener.

    Args:
        config: The configuration.
        fields: Formats by name. The one named ``leg`` is the name of the log as well.
        only: Which requests have a line; None for all.
    """
    settings, names = config.envoy.access_log, Names.of(config)
    line = core.SubstitutionFormatString(json_format=Struct.from_dict(fields))
    found = []
    if settings.stdout:
        found.append(AccessLog(name="envoy.access_loggers.stdout", typed_config=pack(StdoutAccessLog(log_format=line))))
    if settings.file is not None:
        file = FileAccessLog(path=settings.file, log_format=line)
        found.append(AccessLog(name="envoy.access_loggers.file", typed_config=pack(file)))
    if settings.grpc is not None:
        common = als.CommonGrpcAccessLogConfig(
            log_name=fields["leg"],
            grpc_service=_to_cluster(f"{names.logs}_grpc"),
            transport_api_version=core.ApiVersion.V3,
            custom_tags=[_literal("leg", fields["leg"])],
        )
        entries = als.HttpGrpcAccessLogConfig(common_config=common, additional_request_headers_to_log=["x-request-id"])
        found.append(AccessLog(name="envoy.access_loggers.http_grpc", typed_config=pack(entries)))
    if settings.otel is not None:
        attributes = [otel.KeyValue(key=key, value=otel.AnyValue(string_value=text)) for key, text in fields.items()]
        records = OpenTelemetryAccessLogConfig(
            grpc_service=_to_cluster(f"{names.logs}_otel"),
            log_name=fields["leg"],
            attributes=otel.KeyValueList(values=attributes),
        )
        found.append(AccessLog(name="envoy.access_loggers.open_telemetry", typed_config=pack(records)))
    for log in found:
        log.filter = only
    return found


def trace(config: Config, manager: hcm.HttpConnectionManager, hop: str, decision: Sequence[str] = ()) -> None:
    """Let a connection manager begin a span for each request, if tracing is configured.

    Args:
        config: The configuration.
        manager: The connection manager.
        hop: Value of the tag ``hop`` of its spans.
        decision: Keys of the decision in Envoy's metadata, which become tags.
    """
    settings = config.envoy.tracing
    if settings is None:
        return
    share = FractionalPercent(
        numerator=round(settings.sampling * _MILLION), denominator=FractionalPercentDenominatorType.MILLION
    )
    ratio = samplers.TraceIdRatioBasedSamplerConfig(sampling_percentage=share)
    own = core.TypedExtensionConfig(
        name="envoy.tracers.opentelemetry.samplers.trace_id_ratio_based", typed_config=pack(ratio)
    )
    by_parent = samplers.ParentBasedSamplerConfig(wrapped_sampler=own)
    exporter = commented(
        OpenTelemetryConfig(
            grpc_service=_to_cluster(Names.of(config).traces),
            service_name=settings.service_name,
            sampler=core.TypedExtensionConfig(
                name="envoy.tracers.opentelemetry.samplers.parent_based", typed_config=pack(by_parent)
            ),
        ),
        sampler="A trace of the client is sampled as the client decided, a new one by envoy.tracing.sampling.",
    )
    provider = TracingHttp(name="envoy.tracers.opentelemetry", typed_config=pack(exporter))
    tags = [_literal("hop", hop), *map(_from_decision, decision)]
    manager.tracing = hcm.HttpConnectionManagerTracing(provider=provider, custom_tags=tags)
    request_id = UuidRequestIdConfig(pack_trace_reason=False, use_request_id_for_trace_sampling=False)
    manager.request_id_extension = commented(
        hcm.RequestIdExtension(typed_config=pack(request_id)),
        "By default, Envoy changes a character of x-request-id, and traces no request whose id is no UUID.",
    )


def collectors(config: Config) -> Iterator[tuple[str, str]]:
    """Name the clusters of the collectors of spans and access logs, each with its ``host:port``."""
    if config.envoy.tracing is not None:
        yield Names.of(config).traces, config.envoy.tracing.collector
    settings = config.envoy.access_log
    for kind, address in (("grpc", settings.grpc), ("otel", settings.otel)):
        if address is not None:
            yield f"{Names.of(config).logs}_{kind}", address


def _to_cluster(name: str) -> core.GrpcService:
    return core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=name))


def _literal(tag: str, value: str) -> tracing.CustomTag:
    return tracing.CustomTag(tag=tag, literal=tracing.CustomTagLiteral(value=value))


def _from_decision(key: str) -> tracing.CustomTag:
    """Build a tag with a value that the service reported as dynamic metadata."""
    kind = metadata.MetadataKind(request=metadata.MetadataKindRequest())
    place = metadata.MetadataKey(key=METADATA_NAMESPACE, path=[metadata.MetadataKeyPathSegment(key=key)])
    return tracing.CustomTag(tag=key, metadata=tracing.CustomTagMetadata(kind=kind, metadata_key=place))
