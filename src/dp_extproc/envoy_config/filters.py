"""The HTTP filters: those that call the service over ext_proc, and those that remove headers."""

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
    FOREIGN_NAMES,
    FOREIGN_PREFIXES,
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
)
from dp_extproc.envoy_config.addresses import SERVICE, SERVICE_OWNER, may_be_several
from dp_extproc.envoy_config.yaml_text import commented, pack

_SEND: Final = ProcessingModeHeaderSendMode.SEND
_SKIP: Final = ProcessingModeHeaderSendMode.SKIP
"""Headers and trailers; bodies are not sent unless a mode is named."""

_SEND_BODY: Final = {
    BodyMode.BUFFERED: ProcessingModeBodySendMode.BUFFERED,
    BodyMode.FULL_DUPLEX_STREAMED: ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED,
    BodyMode.NONE: ProcessingModeBodySendMode.NONE,
}

FIRST_EVENT_FILTER: Final = "dp_first_event"

_ADDRESS: Final = (OWNER, LEG)
"""Of the decision that a prefill leg belongs to: the process that keeps it, and its token there."""

_ENVOYS: Final = "x-envoy-"
_INSIDE: Final = (OWNED_PREFIX, _ENVOYS)
"""Ours, and Envoy's own. Both steer: on a request such as ``x-envoy-internal``, on an answer such as ``x-dp-retry``,
``x-envoy-ratelimited`` or ``x-envoy-immediate-health-check-fail``."""

_MESSAGE_TIMEOUT: Final = timedelta(seconds=20)
"""Envoy's default of 200 ms is less than reading a body of 32 MB takes on a busy machine."""


def http_filter(name: str, settings: Message) -> HttpFilter:
    """Build an HTTP filter of Envoy's."""
    return HttpFilter(name=f"envoy.filters.http.{name}", typed_config=pack(settings))


def place_requests(config: Config) -> HttpFilter:
    """Build the filter that has each request placed and its body rewritten, and its response held and let go."""
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
        response_trailer_mode="Keeps the stream open, without messages, until the response has ended: the\n"
        "service learns when ranks become free, and when a client has gone.",
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
                receiving_namespaces="What the service may write into dynamic metadata, for the access log below.",
            ),
            status_on_error=HttpStatus(code=StatusCode.ServiceUnavailable),
        ),
        failure_mode_allow="Fail open here, closed in the routes above: if the service dies, responses\n"
        "that are already flowing go on, and new requests get the 503.",
        message_timeout="Envoy's default is 200 ms; a large body takes longer.",
        max_message_timeout="Held responses may take longer than that.",
        allow_mode_override="The text of an engine's error is looked at before it is passed on.",
        forward_rules="All that the service reads; credentials stay in Envoy.",
        status_on_error="In FULL_DUPLEX_STREAMED a filter that has sent the body cannot fail open.",
    )
    return commented(http_filter("ext_proc", processor), "Asks the service.")


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
    return http_filter("header_to_metadata", HeaderToMetadata(request_rules=rules))


def report_prefill(supervision: Supervise) -> HttpFilter:
    """Build the filter that tells the process that placed the request how its prefill leg goes.

    With supervision it opens with the request, so that the leg can be ended; without, with the response.
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
    comment = "Reports the status of the leg to the process that placed the request."
    return commented(http_filter("ext_proc", processor), comment)


def see_first_event(body_mode: BodyMode) -> HttpFilter:
    """Build the filter that shows the beginning of streaming answers to the process that placed the request.

    It does nothing but on routes that say so with :func:`show_first_event`. It belongs into the chain of the cluster:
    were it in that of the listener, beside the filter that holds the response's headers, Envoy would lose what this one
    has not let go yet when the other continues, if the end of the response is in by then (1.40 measured).
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
        "Shows the service how a stream begins; only on the route that is called watched.",
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
    return pack(ExtProcPerRoute(overrides=ExtProcOverrides(processing_mode=mode)))


def _nothing() -> ProcessingMode:
    return ProcessingMode(request_header_mode=_SKIP, response_header_mode=_SKIP)


def _to_any_process(*, several: bool) -> GrpcService:
    service = GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=SERVICE))
    if several:  # one that has died is passed over until Envoy leaves it out
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
    """Keep everything else in Envoy: credentials are none of the service's business, and every header costs it time."""
    patterns = [StringMatcher(exact=name) for name in sorted(names)]
    return HeaderForwardingRules(allowed_headers=ListStringMatcher(patterns=patterns))


def strip_client_headers(session_header: str | None) -> TypedExtensionConfig:
    """Remove what only the router may set, before any filter or route sees the request.

    Args:
        session_header: Header of clients that the service is to see, under a name of ours.
    """
    mutations = [*_remove(FOREIGN_PREFIXES), *(HeaderMutation(remove=name) for name in FOREIGN_NAMES)]
    if session_header is not None:
        copy = HeaderValue(key=SESSION, value=f"%REQ({session_header})%")
        mutations.append(HeaderMutation(append=HeaderValueOption(header=copy)))  # nothing is added for an absent one
    return TypedExtensionConfig(
        name="envoy.http.early_header_mutation.header_mutation",
        typed_config=pack(EarlyHeaderMutation(mutations=mutations)),
    )


def strip_router_headers() -> HttpFilter:
    """Build the filter between Envoy and an engine, of the cluster's own chain: no steering header passes either way.

    A route's ``request_headers_to_remove`` would act before the host is chosen, and the host is chosen by header. A
    route's ``response_headers_to_remove`` would act after the router has read an answer, and after local replies have
    got headers of ours.
    """
    return _mutate(Mutations(request_mutations=_remove(_INSIDE), response_mutations=_remove(_INSIDE)))


def strip_headers_before_placement() -> HttpFilter:
    """Build the filter on the way to the place where requests are placed.

    It removes once more what :func:`strip_client_headers` does: the front door may be another one, which does not. The
    name of the conversation stays; it is the client's own word anyway.
    """
    names = [HeaderMutation(remove=name) for name in (*FOREIGN_NAMES, *SET_INSIDE)]
    return commented(
        _mutate(Mutations(request_mutations=[*_remove((OVERRIDE_PREFIX, _ENVOYS)), *names])),
        "Removes what only the router may set, once more: the front\ndoor may be another one, which does not.",
    )


def last_upstream_filter() -> HttpFilter:
    """Build the filter that has to be the last one of a cluster's chain."""
    return http_filter("upstream_codec", UpstreamCodec())


def _mutate(mutations: Mutations) -> HttpFilter:
    return http_filter("header_mutation", HeaderMutationFilter(mutations=mutations))


def _remove(prefixes: Sequence[str]) -> list[HeaderMutation]:
    return [
        HeaderMutation(remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix)))
        for prefix in prefixes
    ]
