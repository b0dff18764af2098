"""What the printed configuration says about itself, by place (see :func:`~.yaml_text.render_yaml`)."""

from typing import Final

HEADER: Final = """\
Printed by: dp-extproc envoy-config -c FILE

Envoy in front of SGLang servers with prefill/decode disaggregation and several data-parallel ranks.

  client -> inference -> dp_dispatch -> decode server
                             `--mirror-> prefill_leg -> prefill server

The service dp-extproc picks both servers and their ranks and rewrites the body. It names them in x-dp-* headers, so
no engine is listed here, and engines may come and go without a change of this file. docs/envoy.md tells more.
"""

COMMENTS: Final = {
    "listeners inference": "The front door. It forwards everything; it is a hop of its own so that a failed attempt\n"
    "can be repeated from here, and be placed anew.",
    "inference use_remote_address": "The client's address goes into x-forwarded-for, and from there into the log.",
    "inference stream_idle_timeout": "A stream may be silent for as long as the engine is busy with its prompt.",
    "inference request_timeout": "envoy.request_timeout: a client that stops in its body would hold buffers for ever.\n"
    "It ends with the last byte of the request; how long the answer takes does not count.",
    "inference request_headers_timeout": "envoy.request_headers_timeout.",
    "inference delayed_close_timeout": "By default a client learns a second late that its answer was cut off.",
    "inference route timeout": "Envoy's default of 15 s would cut long generations.",
    "inference preserve_external_request_id": "A client's request id is the one that all logs show.",
    "inference suppress_envoy_headers": "No x-envoy-* headers: they are no business of clients or engines.",
    "inference early_header_mutation_extensions": "Before anything else: what only the router may set.\n"
    "The host headers would send a request to any address; x-data-parallel-rank and x-override-* win over the body\n"
    "in SGLang.",
    "inference local_reply_config": "Envoy's own errors in the shape of OpenAI errors.",
    "inference metadata_filter": "The service's own refusals are known by their reason and pass as they are.",
    "inference per_connection_buffer_limit_bytes": "envoy.max_body_bytes and 1 MiB for what rewriting adds. Every hop\n"
    "needs it: a body is held until it is placed, and Envoy's default is 1 MiB.",
    "listeners dp_dispatch": "Where requests are placed. An internal listener has no port.",
    "inference retry_policy": "The service asks for it, and decides how often: retry. It tells where a request has\n"
    "failed, so that it is placed elsewhere.",
    "dp_dispatch watched": "A stream; its first event is shown to the service before the client sees anything.",
    "dp_dispatch disaggregated": "Placed on a pair: decode answers the client, a copy goes to prefill.",
    "dp_dispatch disable_shadow_host_suffix_append": "Or the engine would see the host name with -shadow behind it.",
    "dp_dispatch one_server": "Placed on one server: an aggregated pool, or a request that any server can answer.",
    "dp_dispatch not_placed": "Fail closed: without a decision a request goes nowhere.",
    "dp_dispatch envoy.filters.http.ext_proc": "Asks the service.",
    "dp_dispatch failure_mode_allow": "Fail open here, closed in the routes above: if the service dies, responses\n"
    "that are already flowing go on, and new requests get the 503.",
    "dp_dispatch request_body_mode": "BUFFERED, FULL_DUPLEX_STREAMED or NONE, from envoy.body_mode.",
    "dp_dispatch response_trailer_mode": "Keeps the stream open, without messages, until the response has ended: the\n"
    "service learns when ranks become free, and when a client has gone.",
    "dp_dispatch message_timeout": "Envoy's default is 200 ms; a large body takes longer.",
    "dp_dispatch max_message_timeout": "Held responses may take longer than that.",
    "dp_dispatch allow_mode_override": "The text of an engine's error is looked at before it is passed on.",
    "decode dp_first_event": "Shows the service how a stream begins; only on the route that is called watched.",
    "dp_dispatch forward_rules": "All that the service reads; credentials stay in Envoy.",
    "dp_dispatch receiving_namespaces": "What the service may write into dynamic metadata, for the access log below.",
    "dp_dispatch common_http_protocol_options": "The client's 100 headers and those that the service adds.",
    "dp_dispatch max_request_headers_kb": "The prefill leg's fields travel in a header: some 60 bytes per prompt of a\n"
    "batch. Envoy's default is 60 kB.",
    "dp_dispatch status_on_error": "In FULL_DUPLEX_STREAMED a filter that has sent the body cannot fail open.",
    "listeners prefill_leg": "The mirrored copy, as a request of its own: with its own body, status and log line.",
    "prefill_leg not_rewritten": "The header is removed as the last step of rewriting.",
    "prefill_leg envoy.filters.http.header_to_metadata": "The report below opens after the x-dp-* headers are gone.",
    "prefill_leg envoy.filters.http.lua": "The copy has the decode leg's fields at the front. They are replaced by\n"
    "the prefill leg's; the bytes behind them are the same for both.",
    "prefill_leg envoy.filters.http.ext_proc": "Reports the status of the leg to the process that placed the request.",
    "listeners decode": "Passes the bytes of answering servers on. If a server is lost in mid-stream, the filter ends\n"
    "the stream with an error event; Envoy's HTTP router itself could only cut the client's connection.",
    "decode inline_bytes": "stream_end.c of this project, as WebAssembly.",
    "dp_dispatch envoy.filters.http.set_filter_state": "The address for the connection that the listener decode opens.",
    "clusters extproc": "The service: envoy.service, or listen.grpc.",
    "extproc connection_keepalive": "listen.keepalive: a service whose host is lost closes no connection. What waits\n"
    "for it goes on then; see failure_mode_allow above. The service asks Envoy likewise.",
    "extproc circuit_breakers": "Envoy's default of 1024 is soon reached by streams that last minutes. Whether a\n"
    "request is too much is the service's decision. The same holds for all clusters.",
    "clusters extproc_owner": "The very process of the service that holds the books of a request.",
    "extproc_owner initial_stream_window_size": "The largest: Envoy's send buffer for a stream has the same limit.\n"
    "With its default of 16 MiB, Envoy dies if a request ends while that buffer is full of what an engine has sent\n"
    "and the service has not read.",
    "clusters prefill": "Engines are dialled as the headers say. There is no fallback to another host, since the body\n"
    "names the prefill server that the decode server will ask.",
    "prefill idle_timeout": "Shorter than the 5 s after which SGLang's HTTP server closes an idle connection, or a\n"
    "request would now and then be sent into a closing one.",
    "prefill http_filters": "Runs after the host was chosen by header. A route that removed the headers would act\n"
    "before. Retries belong to the front door: a second try from here would have no headers left. Of an answer it\n"
    "removes the same names before the router reads them: an engine steers nothing.",
    "clusters dp_dispatch": "The way to the internal listeners.",
    "dp_dispatch envoy.filters.http.header_mutation": "Removes what only the router may set, once more: the front\n"
    "door may be another one, which does not.",
    "dp_dispatch envoy.filters.http.lua": "Runs anew for each attempt, and remembers where those before have failed.",
}
"""Text by place. An example configuration in the repository shows the result."""
