"""The HTTP filters that call the service over ext_proc, and those that remove headers."""

import math
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Final

from betterproto2 import Message
from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutation, HeaderMutationRemoveOnMatch
from envoy_data_plane.envoy.config.core.v3 import (
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    HeaderValueOption,
    RetryPolicy,
    RetryPolicyRetryHostPredicate,
    TypedExtensionConfig,
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
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import HeaderMutation as HeaderMutationFilter
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import Mutations
from envoy_data_plane.envoy.extensions.filters.http.header_to_metadata.v3 import Config as HeaderToMetadata
from envoy_data_plane.envoy.extensions.filters.http.header_to_metadata.v3 import ConfigKeyValuePair, ConfigRule
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 import UpstreamCodec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import (
    HeaderMutation as EarlyHeaderMutation,
)
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.type.matcher.v3 import ListStringMatcher, StringMatcher
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Any

from dp_extproc.config import BodyMode, Config, Supervise
from dp_extproc.contract import (
    FIRST_EVENT,
    LEG,
    METADATA_NAMESPACE,
    OVERRIDE_PREFIX,
    OWNED_PREFIX,
    OWNER,
    READ_FROM_REQUESTS,
    READ_FROM_RESPONSES,
    SESSION,
    SET_INSIDE,
    STAGE,
    UNTRUSTED_NAMES,
    UNTRUSTED_PREFIXES,
)
from dp_extproc.envoy_config.addresses import SERVICE, SERVICE_OWNER, may_be_several
from dp_extproc.envoy_config.yaml_text import commented, pack

_SEND: Final = ProcessingModeHeaderSendMode.SEND
_SKIP: Final = ProcessingModeHeaderSendMode.SKIP
"""Modes of headers and trailers. Bodies are not sent unless their mode is set."""

_SEND_BODY: Final = {
    BodyMode.BUFFERED: ProcessingModeBodySendMode.BUFFERED,
    BodyMode.FULL_DUPLEX_STREAMED: ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED,
    BodyMode.NONE: ProcessingModeBodySendMode.NONE,
}

FIRST_EVENT_FILTER: Final = "dp_first_event"

_ADDRESS: Final = (OWNER, LEG)
"""Headers by which a stream finds its attempt: the process that scheduled the request, and the token there."""

_ENVOYS: Final = "x-envoy-"
_INSIDE: Final = (OWNED_PREFIX, _ENVOYS)
"""Prefixes of the headers that steer this project or Envoy. On requests that is for example ``x-envoy-internal``, on
responses ``x-dp-retry``, ``x-envoy-ratelimited`` or ``x-envoy-immediate-health-check-fail``."""

_MESSAGE_TIMEOUT: Final = timedelta(seconds=20)
"""Time for one reply of the service. Envoy's default of 200 ms is too short for a body of 32 MB on a busy machine."""


def http_filter(name: str, settings: Message) -> HttpFilter:
    """Build one of the HTTP filters that are part of Envoy."""
    return HttpFilter(name=f"envoy.filters.http.{name}", typed_config=pack(settings))


def schedule_requests(config: Config) -> HttpFilter:
    """Build the filter with which the service schedules each request, rewrites its body, and holds its response."""
    body_mode = config.envoy.body_mode
    supervision = config.supervision
    mode = commented(
        ProcessingMode(
            request_header_mode=_SEND,
            response_header_mode=_SEND,
            request_body_mode=_SEND_BODY[body_mode],
            request_trailer_mode=_SEND if body_mode is BodyMode.FULL_DUPLEX_STREAMED else _SKIP,
            response_trailer_mode=_SEND,
        ),
        request_body_mode="BUFFERED, FULL_DUPLEX_STREAMED or NONE, from envoy.body_mode.",
        response_trailer_mode="Keeps the stream open without messages until the response has ended. Its end\n"
        "frees the reservations, also if the client has disconnected.",
    )
    processor = commented(
        ExternalProcessor(
            grpc_service=_to_any_process(several=may_be_several(config)),
            failure_mode_allow=True,
            processing_mode=mode,
            message_timeout=_MESSAGE_TIMEOUT,
            max_message_timeout=timedelta(
                seconds=math.ceil(supervision.prefill_timeout + supervision.first_token_timeout)
            ),
            allow_mode_override=True,
            forward_rules=_only(READ_FROM_REQUESTS | READ_FROM_RESPONSES),
            metadata_options=commented(
                MetadataOptions(receiving_namespaces=MetadataOptionsMetadataNamespaces(untyped=[METADATA_NAMESPACE])),
                receiving_namespaces="The dynamic metadata that the service may set, for the access log below.",
            ),
            status_on_error=HttpStatus(code=StatusCode.ServiceUnavailable),
        ),
        failure_mode_allow="Fail open here, and closed in the routes above. If the service crashes, running responses\n"
        "continue, and new requests get the 503.",
        message_timeout="Envoy's default is 200 ms; a large body takes longer.",
        max_message_timeout="The service may hold a response for longer than that.",
        allow_mode_override="The service reads the text of an engine's error before the client gets it.",
        forward_rules="The headers that the service reads; credentials stay in Envoy.",
        status_on_error="In FULL_DUPLEX_STREAMED a filter that has sent the body cannot fail open.",
    )
    return commented(http_filter("ext_proc", processor), "Calls the service.")


def remember_owner() -> HttpFilter:
    """Build the filter that copies the owner of an attempt into metadata, for the streams that report on it.

    A report may open with the response. The headers are gone by then, because the cluster removes them from the only
    header map that a request has.
    """
    rules = [
        ConfigRule(
            header=name,
            on_header_present=ConfigKeyValuePair(metadata_namespace=METADATA_NAMESPACE, key=name),
        )
        for name in _ADDRESS
    ]
    return http_filter("header_to_metadata", HeaderToMetadata(request_rules=rules))


def report_prefill(supervision: Supervise) -> HttpFilter:
    """Build the filter that reports the prefill leg to the process that scheduled the request.

    With supervision its stream opens with the request, so that the service can cancel the leg; otherwise with the
    response.
    """
    processor = ExternalProcessor(
        grpc_service=_to_owner(),
        failure_mode_allow=True,
        allow_mode_override=True,
        processing_mode=ProcessingMode(
            request_header_mode=_SKIP if supervision is Supervise.OFF else _SEND,
            response_header_mode=_SEND,
            request_trailer_mode=_SKIP,
            response_trailer_mode=_SKIP,
        ),
        message_timeout=_MESSAGE_TIMEOUT,
        forward_rules=_only(READ_FROM_RESPONSES),
    )
    comment = "Reports the status of the leg to the process that scheduled the request."
    return commented(http_filter("ext_proc", processor), comment)


def report_first_event(body_mode: BodyMode) -> HttpFilter:
    """Build the filter that reports the first event of streams to the process that scheduled the request.

    It is idle except on routes with :func:`enable_first_event_report`. It has to be in the chain of the cluster. Beside
    the filter that holds the response headers, in the chain of the listener, Envoy loses short streams: it drops what
    this filter still holds if the other one continues after the end of the response (measured with 1.40).
    """
    processor = ExternalProcessor(
        grpc_service=_to_owner(HeaderValue(key=STAGE, value=FIRST_EVENT)),
        failure_mode_allow=True,
        allow_mode_override=body_mode is BodyMode.NONE,
        processing_mode=_nothing(),
        message_timeout=_MESSAGE_TIMEOUT,
        forward_rules=_only(READ_FROM_RESPONSES) if body_mode is BodyMode.NONE else None,
    )
    return commented(
        HttpFilter(name=FIRST_EVENT_FILTER, typed_config=pack(processor)),
        "Reports the first event of a stream to the service, on the route named watched only.",
    )


def enable_first_event_report(body_mode: BodyMode) -> Any:
    """Build the setting of a route that enables :func:`report_first_event`.

    Without the request's body the service cannot see whether the client wants a stream. It gets the response headers
    then, and requests the rest by itself.
    """
    mode = _nothing()
    if body_mode is BodyMode.NONE:
        mode.response_header_mode = _SEND
    else:
        mode.response_body_mode = ProcessingModeBodySendMode.STREAMED
    return pack(ExtProcPerRoute(overrides=ExtProcOverrides(processing_mode=mode)))


def _nothing() -> ProcessingMode:
    return ProcessingMode(request_header_mode=_SKIP, response_header_mode=_SKIP)


def _to_any_process(*, several: bool) -> GrpcService:
    service = GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=SERVICE))
    if several:  # A dead process is skipped until Envoy ejects it.
        service.retry_policy = RetryPolicy(
            retry_on="connect-failure",
            num_retries=1,
            retry_host_predicate=[
                RetryPolicyRetryHostPredicate(
                    name="envoy.retry_host_predicates.previous_hosts", typed_config=pack(PreviousHostsPredicate())
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
    """Forward these headers alone: the service has no use for credentials, and each header costs time to decode."""
    patterns = [StringMatcher(exact=name) for name in sorted(names)]
    return HeaderForwardingRules(allowed_headers=ListStringMatcher(patterns=patterns))


def strip_client_headers(session_header: str | None) -> TypedExtensionConfig:
    """Build the mutation that removes untrusted headers before any filter or route reads the request.

    Args:
        session_header: Header of clients that is copied to :data:`~dp_extproc.contract.SESSION` for the service.
    """
    mutations = [*_remove(UNTRUSTED_PREFIXES), *(HeaderMutation(remove=name) for name in UNTRUSTED_NAMES)]
    if session_header is not None:
        copy = HeaderValue(key=SESSION, value=f"%REQ({session_header})%")
        mutations.append(HeaderMutation(append=HeaderValueOption(header=copy)))  # Envoy adds no empty header.
    return TypedExtensionConfig(
        name="envoy.http.early_header_mutation.header_mutation",
        typed_config=pack(EarlyHeaderMutation(mutations=mutations)),
    )


def strip_steering_headers() -> HttpFilter:
    """Build the filter of an engine's cluster that removes steering headers from requests and responses.

    A route's ``request_headers_to_remove`` acts too early: Envoy picks the endpoint by such a header afterwards. A
    route's ``response_headers_to_remove`` acts too late: Envoy's router has read the response by then, and local
    replies have got headers of the same names.
    """
    return _mutate(Mutations(request_mutations=_remove(_INSIDE), response_mutations=_remove(_INSIDE)))


def strip_headers_before_scheduling() -> HttpFilter:
    """Build the filter that removes untrusted headers on the way to the listener where requests are scheduled.

    It repeats :func:`strip_client_headers`, because another front door may lack that. The name of the conversation
    stays, since the client chooses it in any case.
    """
    names = [HeaderMutation(remove=name) for name in (*UNTRUSTED_NAMES, *SET_INSIDE)]
    return commented(
        _mutate(Mutations(request_mutations=[*_remove((OVERRIDE_PREFIX, _ENVOYS)), *names])),
        "Removes untrusted headers once more, because another front door may not do so.",
    )


def last_upstream_filter() -> HttpFilter:
    """Build the filter that Envoy demands at the end of a cluster's chain."""
    return http_filter("upstream_codec", UpstreamCodec())


def _mutate(mutations: Mutations) -> HttpFilter:
    return http_filter("header_mutation", HeaderMutationFilter(mutations=mutations))


def _remove(prefixes: Sequence[str]) -> list[HeaderMutation]:
    return [
        HeaderMutation(remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix)))
        for prefix in prefixes
    ]
