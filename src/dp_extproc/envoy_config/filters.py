"""The HTTP filters of Envoy that call the service over ext_proc, and those that remove headers."""

import math
from collections.abc import Collection, Iterable, Sequence
from datetime import timedelta
from typing import Final

from betterproto2 import Message
from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutation, HeaderMutationRemoveOnMatch
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.extensions.filters.http.header_mutation import v3 as header_mutation
from envoy_data_plane.envoy.extensions.filters.http.header_to_metadata import v3 as header_to_metadata
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 import UpstreamCodec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation import v3 as early_header_mutation
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.type.matcher.v3 import ListStringMatcher, StringMatcher
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Any

from dp_extproc import contract
from dp_extproc.config import BodyMode, Config, Supervise
from dp_extproc.envoy_config.addresses import may_be_several
from dp_extproc.envoy_config.names import Names
from dp_extproc.envoy_config.yaml_text import commented, pack

_SEND: Final = ext_proc.ProcessingModeHeaderSendMode.SEND
_SKIP: Final = ext_proc.ProcessingModeHeaderSendMode.SKIP
"""Modes of headers and trailers. Bodies are not sent unless their mode is set."""

FIRST_EVENT_FILTER: Final = "dp_first_event"

_ATTEMPT_HEADERS: Final = (contract.OWNER, contract.LEG)
"""Headers by which a stream finds its attempt: the process that scheduled the request, and the token there."""

_ENVOY_PREFIX: Final = "x-envoy-"
_STEERING_PREFIXES: Final = (contract.OWNED_PREFIX, _ENVOY_PREFIX)
"""Prefixes of the headers that steer this project or Envoy. Examples are ``x-envoy-internal`` on requests, and
``x-dp-retry`` or ``x-envoy-immediate-health-check-fail`` on responses."""

_ACCEPT_ENCODING: Final = "accept-encoding"

_MESSAGE_TIMEOUT: Final = timedelta(seconds=20)
"""Time for one reply of the service. Envoy's default of 200 ms is too short for a body of 32 MB on a busy machine."""


def http_filter(name: str, settings: Message) -> HttpFilter:
    """Build one of the HTTP filters that are part of Envoy."""
    return HttpFilter(name=f"envoy.filters.http.{name}", typed_config=pack(settings))


def schedule_requests(config: Config) -> HttpFilter:
    """Build the filter with which the service schedules each request, rewrites its body, and holds its response."""
    body_mode = config.envoy.body_mode
    longest_hold = math.ceil(config.supervision.prefill_timeout + config.supervision.first_token_timeout)
    mode = commented(
        ext_proc.ProcessingMode(
            request_header_mode=_SEND,
            response_header_mode=_SEND,
            request_body_mode=ext_proc.ProcessingModeBodySendMode[body_mode.name],
            request_trailer_mode=_SEND if body_mode is BodyMode.FULL_DUPLEX_STREAMED else _SKIP,
            response_trailer_mode=_SEND,
        ),
        request_body_mode="BUFFERED, FULL_DUPLEX_STREAMED or NONE, from envoy.body_mode.",
        response_trailer_mode="Keeps the stream open without messages until the response has ended. Its end\n"
        "frees the reservations, also if the client has disconnected.",
    )
    namespaces = ext_proc.MetadataOptionsMetadataNamespaces(untyped=[contract.METADATA_NAMESPACE])
    metadata = commented(
        ext_proc.MetadataOptions(receiving_namespaces=namespaces),
        receiving_namespaces="The dynamic metadata that the service may set, for the access log below.",
    )
    processor = commented(
        ext_proc.ExternalProcessor(
            grpc_service=_to_any_process(Names.of(config).service, several=may_be_several(config)),
            failure_mode_allow=True,
            processing_mode=mode,
            message_timeout=_MESSAGE_TIMEOUT,
            max_message_timeout=timedelta(seconds=longest_hold),
            allow_mode_override=True,
            forward_rules=_forward_only(
                contract.READ_FROM_REQUESTS
                | contract.READ_FROM_RESPONSES
                | contract.READ_FROM_LOCAL_REPLIES
                | _passed_to_prefill(config)
            ),
            metadata_options=metadata,
            status_on_error=HttpStatus(code=StatusCode.ServiceUnavailable),
        ),
        failure_mode_allow="Fail open here, and closed in the routes above. If the service crashes, running responses\n"
        "continue, and new requests get the 503.",
        message_timeout="Envoy's default is 200 ms; a large body takes longer.",
        max_message_timeout="The service may hold a response for longer than that.",
        allow_mode_override="The service reads the text of an engine's error before the client gets it.",
        forward_rules="The headers that the service reads, and those that it sends with a prefill leg."
        if config.sends_legs
        else "The headers that the service reads; credentials stay in Envoy.",
        status_on_error="In FULL_DUPLEX_STREAMED a filter that has sent the body cannot fail open.",
    )
    return commented(http_filter("ext_proc", processor), "Calls the service.")


def _passed_to_prefill(config: Config) -> set[str]:
    """Name the headers of clients that the service needs for prefill legs, credentials only where a pool has none."""
    if not config.sends_legs:
        return set()
    has_keys = all(pool.api_key is not None for pool in config.pools if pool.is_disaggregated)
    return set(contract.PASSED_TO_PREFILL) - ({contract.AUTHORIZATION} if has_keys else set())


def remember_owner() -> HttpFilter:
    """Build the filter that copies :data:`_ATTEMPT_HEADERS` into metadata, for the streams that report on an attempt.

    The stream of a report may open with the response. The headers are gone by then, because the filters of the cluster
    remove them from the request.
    """
    copied = {
        name: header_to_metadata.ConfigKeyValuePair(metadata_namespace=contract.METADATA_NAMESPACE, key=name)
        for name in _ATTEMPT_HEADERS
    }
    rules = [header_to_metadata.ConfigRule(header=name, on_header_present=pair) for name, pair in copied.items()]
    return http_filter("header_to_metadata", header_to_metadata.Config(request_rules=rules))


def report_prefill(names: Names, supervision: Supervise) -> HttpFilter:
    """Build the filter that reports the prefill leg to the process that scheduled the request.

    With supervision the filter opens its stream with the request, so that the service can cancel the leg. Without, it
    opens it with the response.
    """
    processor = ext_proc.ExternalProcessor(
        grpc_service=_to_owner(names),
        failure_mode_allow=True,
        allow_mode_override=True,
        processing_mode=ext_proc.ProcessingMode(
            request_header_mode=_SKIP if supervision is Supervise.OFF else _SEND,
            response_header_mode=_SEND,
            request_trailer_mode=_SKIP,
            response_trailer_mode=_SKIP,
        ),
        message_timeout=_MESSAGE_TIMEOUT,
        forward_rules=_forward_only(contract.READ_FROM_RESPONSES),
    )
    comment = "Reports the status of the leg to the process that scheduled the request."
    return commented(http_filter("ext_proc", processor), comment)


def report_first_event(names: Names, body_mode: BodyMode) -> HttpFilter:
    """Build the filter that reports the first event of streams to the process that scheduled the request.

    It is idle except on routes with :func:`enable_first_event_report`. It must be in the filter chain of the cluster.
    In that of the listener, beside the filter that holds the response headers, Envoy would lose short streams: it drops
    what this filter still has if the other one continues after the end of the response (measured with 1.40).
    """
    processor = ext_proc.ExternalProcessor(
        grpc_service=_to_owner(names, core.HeaderValue(key=contract.STAGE, value=contract.FIRST_EVENT)),
        failure_mode_allow=True,
        allow_mode_override=body_mode is BodyMode.NONE,
        processing_mode=_no_messages(),
        message_timeout=_MESSAGE_TIMEOUT,
        forward_rules=_forward_only(contract.READ_FROM_RESPONSES),
    )
    return commented(
        HttpFilter(name=FIRST_EVENT_FILTER, typed_config=pack(processor)),
        "Reports the first event of a stream to the service, on the route named watched only.",
    )


def enable_response_report() -> Any:
    """Build the setting of a route on which :func:`report_first_event` sends the whole response, to be changed."""
    mode = _no_messages()
    mode.response_header_mode = _SEND
    mode.response_body_mode = ext_proc.ProcessingModeBodySendMode.STREAMED
    return pack(ext_proc.ExtProcPerRoute(overrides=ext_proc.ExtProcOverrides(processing_mode=mode)))


def enable_first_event_report(body_mode: BodyMode) -> Any:
    """Build the setting of a route that enables :func:`report_first_event`.

    With :attr:`BodyMode.NONE` the service cannot see in the request whether the client wants a stream. It then gets the
    response headers first, and requests the body of streams.
    """
    mode = _no_messages()
    if body_mode is BodyMode.NONE:
        mode.response_header_mode = _SEND
    else:
        mode.response_body_mode = ext_proc.ProcessingModeBodySendMode.STREAMED
    return pack(ext_proc.ExtProcPerRoute(overrides=ext_proc.ExtProcOverrides(processing_mode=mode)))


def _no_messages() -> ext_proc.ProcessingMode:
    return ext_proc.ProcessingMode(request_header_mode=_SKIP, response_header_mode=_SKIP)


def _to_any_process(cluster: str, *, several: bool) -> core.GrpcService:
    service = core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=cluster))
    if several:  # A dead process is skipped until Envoy ejects it.
        another = core.RetryPolicyRetryHostPredicate(
            name="envoy.retry_host_predicates.previous_hosts", typed_config=pack(PreviousHostsPredicate())
        )
        service.retry_policy = core.RetryPolicy(
            retry_on="connect-failure",
            num_retries=1,
            retry_host_predicate=[another],
            host_selection_retry_max_attempts=3,
        )
    return service


def _to_owner(names: Names, *more: core.HeaderValue) -> core.GrpcService:
    attempt = {name: f"%DYNAMIC_METADATA({contract.METADATA_NAMESPACE}:{name})%" for name in _ATTEMPT_HEADERS}
    return core.GrpcService(
        envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=names.service_owner),
        initial_metadata=[*(core.HeaderValue(key=name, value=value) for name, value in attempt.items()), *more],
    )


def _forward_only(names: Collection[str]) -> ext_proc.HeaderForwardingRules:
    """Send the service no other headers. It has no use for credentials, and each header costs time to decode."""
    patterns = [StringMatcher(exact=name) for name in sorted(names)]
    return ext_proc.HeaderForwardingRules(allowed_headers=ListStringMatcher(patterns=patterns))


def removed_from_clients() -> list[HeaderMutation]:
    """Build the mutations that remove the untrusted headers of clients."""
    return _remove_by_prefix(contract.UNTRUSTED_PREFIXES) + _remove_by_name(contract.UNTRUSTED_NAMES)


def strip_client_headers() -> core.TypedExtensionConfig:
    """Build the mutation that removes untrusted headers before any filter or route reads the request."""
    return _early_mutation(removed_from_clients())


def strip_before_scheduling() -> core.TypedExtensionConfig:
    """Build the mutation that removes untrusted headers at the listener where requests are scheduled.

    It repeats :func:`strip_client_headers`, because the listener before may be any. :func:`strip_attempt_headers`
    removes the two headers that pass here, on the only way to this listener.
    """
    removed = _remove_by_prefix((contract.OVERRIDE_PREFIX, _ENVOY_PREFIX))
    internal = (name for name in contract.SET_INSIDE if name != contract.AVOID)
    return _early_mutation(removed + _remove_by_name((*contract.UNTRUSTED_NAMES, *internal)))


def strip_steering_headers() -> HttpFilter:
    """Build the filter of an engine's cluster that removes steering headers from requests and responses.

    It removes ``accept-encoding``, too, because the service cannot read compressed responses. Here a compressor of the
    gateway, which may stand in any filter chain before, has read the header already.

    A route's ``request_headers_to_remove`` acts too early: Envoy picks the endpoint by such a header afterwards. A
    route's ``response_headers_to_remove`` acts too late: Envoy's router has read the response by then, and local
    replies have got headers of the same names.
    """
    removed = _remove_by_prefix(_STEERING_PREFIXES)
    unasked = _remove_by_name((_ACCEPT_ENCODING,))
    return _mutation_filter(
        header_mutation.Mutations(request_mutations=[*removed, *unasked], response_mutations=removed)
    )


def strip_attempt_headers(session_header: str | None) -> HttpFilter:
    """Build the filter on the way to the listener where requests are scheduled, which sets what that listener accepts.

    These are the failed attempts, which a later filter adds, and the name of the conversation. Both are removed first.
    The filter runs anew for each attempt.

    Args:
        session_header: Header of clients that is copied to :data:`~dp_extproc.contract.SESSION` for the service.
    """
    mutations = _remove_by_prefix((contract.OWNED_PREFIX,))
    if session_header is not None:
        copy = core.HeaderValue(key=contract.SESSION, value=f"%REQ({session_header})%")
        # Envoy adds no empty header.
        mutations.append(HeaderMutation(append=core.HeaderValueOption(header=copy)))
    return commented(
        _mutation_filter(header_mutation.Mutations(request_mutations=mutations)),
        "A client sets no x-dp-* header, whichever listener it reached. envoy.session_header is copied here.",
    )


def allow_asked_headers() -> HttpFilter:
    """Build the filter that allows a web page all headers that its preflight request names.

    Browsers do not take ``*`` for ``authorization`` (Fetch standard). SGLang and vLLM answer so, too.
    """
    allowed = core.HeaderValue(key="access-control-allow-headers", value="%REQ(access-control-request-headers)%")
    option = core.HeaderValueOption(
        header=allowed, append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS
    )
    return commented(
        _mutation_filter(header_mutation.Mutations(response_mutations=[HeaderMutation(append=option)])),
        "Preflight requests get the headers allowed that they name; for browsers * leaves out authorization.",
    )


def last_upstream_filter() -> HttpFilter:
    """Build the filter that Envoy demands at the end of a cluster's chain."""
    return http_filter("upstream_codec", UpstreamCodec())


def _mutation_filter(mutations: header_mutation.Mutations) -> HttpFilter:
    return http_filter("header_mutation", header_mutation.HeaderMutation(mutations=mutations))


def _early_mutation(mutations: Sequence[HeaderMutation]) -> core.TypedExtensionConfig:
    return core.TypedExtensionConfig(
        name="envoy.http.early_header_mutation.header_mutation",
        typed_config=pack(early_header_mutation.HeaderMutation(mutations=list(mutations))),
    )


def _remove_by_name(names: Iterable[str]) -> list[HeaderMutation]:
    return [HeaderMutation(remove=name) for name in names]


def _remove_by_prefix(prefixes: Sequence[str]) -> list[HeaderMutation]:
    matches = [HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix)) for prefix in prefixes]
    return [HeaderMutation(remove_on_match=match) for match in matches]
