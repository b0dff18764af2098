"""The ext_proc filters: the one that places a request, and those that report on its legs."""

import math
from collections.abc import Collection
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.core.v3 import (
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    RetryPolicy,
    RetryPolicyRetryHostPredicate,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    ExtProcOverrides,
    ExtProcPerRoute,
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
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.type.matcher.v3 import ListStringMatcher, StringMatcher
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Any

from dp_extproc.config import BodyMode, Config, Supervise
from dp_extproc.contract import (
    FIRST_EVENT,
    LEG,
    METADATA_NAMESPACE,
    OWNER,
    READ_FROM_REQUESTS,
    READ_FROM_RESPONSES,
    STAGE,
)
from dp_extproc.envoy_config.cluster_names import SERVICE, SERVICE_OWNER
from dp_extproc.envoy_config.service_addresses import may_be_several

_SEND: Final = ProcessingModeHeaderSendMode.SEND
_SKIP: Final = ProcessingModeHeaderSendMode.SKIP
_NO_BODY: Final = ProcessingModeBodySendMode.NONE

_SEND_BODY: Final = {
    BodyMode.BUFFERED: ProcessingModeBodySendMode.BUFFERED,
    BodyMode.FULL_DUPLEX_STREAMED: ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED,
    BodyMode.NONE: _NO_BODY,
}

FIRST_EVENT_FILTER: Final = "dp_first_event"

_ADDRESS: Final = (OWNER, LEG)
"""Of the decision that a prefill leg belongs to: the process that keeps it, and its token there."""

_MESSAGE_TIMEOUT: Final = timedelta(seconds=20)
"""Envoy's default of 200 ms is less than reading a body of 32 MB takes on a busy machine."""


def place_requests(config: Config) -> HttpFilter:
    """Build the filter that has each request placed and its body rewritten, and its response held and let go."""
    body_mode = config.envoy.body_mode
    supervision = config.supervision
    return _filter(
        ExternalProcessor(
            grpc_service=_to_any_process(several=may_be_several(config)),
            failure_mode_allow=True,
            processing_mode=ProcessingMode(
                request_header_mode=_SEND,
                response_header_mode=_SEND,
                request_body_mode=_SEND_BODY[body_mode],
                response_body_mode=_NO_BODY,
                request_trailer_mode=_SEND if body_mode is BodyMode.FULL_DUPLEX_STREAMED else _SKIP,
                response_trailer_mode=_SEND,
            ),
            message_timeout=_MESSAGE_TIMEOUT,
            max_message_timeout=timedelta(
                seconds=math.ceil(supervision.prefill_timeout + supervision.first_token_timeout)
            ),
            allow_mode_override=True,
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


def report_prefill(supervision: Supervise) -> HttpFilter:
    """Build the filter that tells the process that placed the request how its prefill leg goes.

    With supervision it opens with the request, so that the leg can be ended; without, with the response.
    """
    return _filter(
        ExternalProcessor(
            grpc_service=_to_owner(),
            failure_mode_allow=True,
            allow_mode_override=True,
            processing_mode=ProcessingMode(
                request_header_mode=_SKIP if supervision is Supervise.OFF else _SEND,
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


def see_first_event(body_mode: BodyMode) -> HttpFilter:
    """Build the filter that shows the beginning of streaming answers to the process that placed the request.

    It does nothing but on routes that say so with :func:`show_first_event`. It belongs into the chain of the cluster:
    were it in that of the listener, beside the filter that holds the response's headers, Envoy would lose what this one
    has not let go yet when the other continues, if the end of the response is in by then (1.40 measured).
    """
    return _filter(
        ExternalProcessor(
            grpc_service=_to_owner(HeaderValue(key=STAGE, value=FIRST_EVENT)),
            failure_mode_allow=True,
            allow_mode_override=body_mode is BodyMode.NONE,
            processing_mode=_nothing(),
            message_timeout=_MESSAGE_TIMEOUT,
            forward_rules=_only(READ_FROM_RESPONSES) if body_mode is BodyMode.NONE else None,
        ),
        FIRST_EVENT_FILTER,
    )


def show_first_event(body_mode: BodyMode) -> Any:
    """Build what switches :func:`see_first_event` on for a route.

    A service that has not seen the request's body does not know whether it asks for a stream. It is shown the answer's
    head, and asks for the rest itself.
    """
    mode = _nothing()
    if body_mode is BodyMode.NONE:
        mode.response_header_mode = _SEND
    else:
        mode.response_body_mode = ProcessingModeBodySendMode.STREAMED
    return Any.pack(ExtProcPerRoute(overrides=ExtProcOverrides(processing_mode=mode)))


def _nothing() -> ProcessingMode:
    return ProcessingMode(
        request_header_mode=_SKIP,
        response_header_mode=_SKIP,
        request_body_mode=_NO_BODY,
        response_body_mode=_NO_BODY,
    )


def _to_any_process(*, several: bool) -> GrpcService:
    service = GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=SERVICE))
    if several:  # one that has died is passed over until Envoy leaves it out
        service.retry_policy = RetryPolicy(
            retry_on="connect-failure",
            num_retries=1,
            retry_host_predicate=[
                RetryPolicyRetryHostPredicate(
                    name="envoy.retry_host_predicates.previous_hosts", typed_config=Any.pack(PreviousHostsPredicate())
                )
            ],
            host_selection_retry_max_attempts=3,
        )
    return service


def _to_owner(*more: HeaderValue) -> GrpcService:
    return GrpcService(
        envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=SERVICE_OWNER),
        initial_metadata=[
            *(HeaderValue(key=name, value=f"%DYNAMIC_METADATA({METADATA_NAMESPACE}:{name})%") for name in _ADDRESS),
            *more,
        ],
    )


def _only(names: Collection[str]) -> HeaderForwardingRules:
    """Keep everything else in Envoy: credentials are none of the service's business, and every header costs it time."""
    patterns = [StringMatcher(exact=name) for name in sorted(names)]
    return HeaderForwardingRules(allowed_headers=ListStringMatcher(patterns=patterns))


def _filter(processor: ExternalProcessor, name: str = "envoy.filters.http.ext_proc") -> HttpFilter:
    return HttpFilter(name=name, typed_config=Any.pack(processor))
