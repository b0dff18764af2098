"""The two ext_proc filters: the one that places a request, and the one that reports how the prefill leg went."""

from collections.abc import Collection
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.core.v3 import GrpcService, GrpcServiceEnvoyGrpc, HeaderValue
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    HeaderForwardingRules,
    MetadataOptions,
    MetadataOptionsMetadataNamespaces,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.header_to_metadata.v3 import Config as HeaderToMetadata
from envoy_data_plane.envoy.extensions.filters.http.header_to_metadata.v3 import (
    ConfigKeyValuePair,
    ConfigRule,
)
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.type.matcher.v3 import ListStringMatcher, StringMatcher
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Any

from dp_extproc.config import BodyMode
from dp_extproc.envoy_config.clusters import SERVICE, SERVICE_OWNER
from dp_extproc.extproc.names import LEG, METADATA_NAMESPACE, OWNER, READ_FROM_REQUESTS, READ_FROM_RESPONSES

_SEND: Final = ProcessingModeHeaderSendMode.SEND
_SKIP: Final = ProcessingModeHeaderSendMode.SKIP
_NO_BODY: Final = ProcessingModeBodySendMode.NONE

_ADDRESS: Final = (OWNER, LEG)
"""Of the decision that a prefill leg belongs to: the process that keeps it, and its token there."""

_MESSAGE_TIMEOUT: Final = timedelta(seconds=20)
"""Envoy's default of 200 ms is less than reading a body of 32 MB takes on a busy machine."""


def place_requests(body_mode: BodyMode) -> HttpFilter:
    """Build the filter that has each request placed and its body rewritten."""
    duplex = body_mode is BodyMode.DUPLEX
    return _filter(
        ExternalProcessor(
            grpc_service=GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=SERVICE)),
            failure_mode_allow=True,
            processing_mode=ProcessingMode(
                request_header_mode=_SEND,
                response_header_mode=_SEND,
                request_body_mode=(
                    ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED if duplex else ProcessingModeBodySendMode.BUFFERED
                ),
                response_body_mode=_NO_BODY,
                request_trailer_mode=_SEND if duplex else _SKIP,
                response_trailer_mode=_SEND,
            ),
            message_timeout=_MESSAGE_TIMEOUT,
            forward_rules=_only(READ_FROM_REQUESTS | READ_FROM_RESPONSES),
            metadata_options=MetadataOptions(
                receiving_namespaces=MetadataOptionsMetadataNamespaces(untyped=[METADATA_NAMESPACE])
            ),
            status_on_error=HttpStatus(code=StatusCode.ServiceUnavailable),
        )
    )


def remember_owner() -> HttpFilter:
    """Build the filter that keeps the owner of a prefill leg until its response comes.

    The report is opened with the response. The headers are gone by then: the cluster strips them from the one header
    map that a request has.
    """
    rules = [
        ConfigRule(
            header=name,
            on_header_present=ConfigKeyValuePair(metadata_namespace=METADATA_NAMESPACE, key=name),
        )
        for name in _ADDRESS
    ]
    return HttpFilter(
        name="envoy.filters.http.header_to_metadata", typed_config=Any.pack(HeaderToMetadata(request_rules=rules))
    )


def report_prefill() -> HttpFilter:
    """Build the filter that tells the process that placed the request which status its prefill leg got."""
    return _filter(
        ExternalProcessor(
            grpc_service=GrpcService(
                envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=SERVICE_OWNER),
                initial_metadata=[
                    HeaderValue(key=name, value=f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{name})%") for name in _ADDRESS
                ],
            ),
            failure_mode_allow=True,
            processing_mode=ProcessingMode(
                request_header_mode=_SKIP,
                response_header_mode=_SEND,
                request_body_mode=_NO_BODY,
                response_body_mode=_NO_BODY,
                request_trailer_mode=_SKIP,
                response_trailer_mode=_SKIP,
            ),
            message_timeout=_MESSAGE_TIMEOUT,
            forward_rules=_only(READ_FROM_RESPONSES),
        )
    )


def _only(names: Collection[str]) -> HeaderForwardingRules:
    """Keep everything else in Envoy: credentials are none of the service's business, and every header costs it time."""
    patterns = [StringMatcher(exact=name) for name in sorted(names)]
    return HeaderForwardingRules(allowed_headers=ListStringMatcher(patterns=patterns))


def _filter(processor: ExternalProcessor) -> HttpFilter:
    return HttpFilter(name="envoy.filters.http.ext_proc", typed_config=Any.pack(processor))
