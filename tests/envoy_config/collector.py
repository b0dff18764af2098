"""A collector of spans and logs: OpenTelemetry's by gRPC, and Envoy's access log service."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from envoy.service.accesslog.v3 import als_pb2
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces


@dataclass(frozen=True, slots=True)
class Span:
    trace: str
    id: str
    parent: str
    tags: dict[str, str]


@dataclass(slots=True)
class Collector:
    """What arrived so far."""

    address: str = ""
    spans: list[Span] = field(default_factory=list)
    records: list[dict[str, str]] = field(default_factory=list)
    """Log records of OpenTelemetry, each as its attributes."""
    entries: list[Any] = field(default_factory=list)
    """Entries of the access log service."""

    def hops(self, trace: str) -> dict[str, Span]:
        """Return the spans of a trace that connection managers began, by the tag ``hop``."""
        return {each.tags["hop"]: each for each in self.spans if each.trace == trace and "hop" in each.tags}

    def ancestors(self, span: Span) -> set[str]:
        """Return the ids of the spans above a span, up to one that another program has."""
        of_trace = {each.id: each for each in self.spans if each.trace == span.trace}
        found: set[str] = set()
        above: Span | None = span
        while above is not None and above.parent:
            found.add(above.parent)
            above = of_trace.get(above.parent)
        return found


@contextmanager
def run_collector() -> Iterator[Collector]:
    """Run a collector in threads of its own."""
    found = Collector()

    def export_traces(request: Any, context: grpc.ServicerContext) -> Any:
        for resource in request.resource_spans:
            for scope in _second(resource):
                found.spans.extend(map(_span, _second(scope)))
        return traces.ExportTraceServiceResponse()

    def export_logs(request: Any, context: grpc.ServicerContext) -> Any:
        for resource in request.resource_logs:
            for scope in _second(resource):
                found.records.extend(_texts(each.attributes) for each in _second(scope))
        return logs.ExportLogsServiceResponse()

    def entries(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        for message in messages:
            found.entries.extend(message.http_logs.log_entry)
        return als_pb2.StreamAccessLogsResponse()

    stream = grpc.stream_unary_rpc_method_handler(entries, als_pb2.StreamAccessLogsMessage.FromString, _write)
    spans = grpc.unary_unary_rpc_method_handler(export_traces, traces.ExportTraceServiceRequest.FromString, _write)
    lines = grpc.unary_unary_rpc_method_handler(export_logs, logs.ExportLogsServiceRequest.FromString, _write)
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "envoy.service.accesslog.v3.AccessLogService", {"StreamAccessLogs": stream}
            ),
            grpc.method_handlers_generic_handler(
                "opentelemetry.proto.collector.trace.v1.TraceService", {"Export": spans}
            ),
            grpc.method_handlers_generic_handler(
                "opentelemetry.proto.collector.logs.v1.LogsService", {"Export": lines}
            ),
        )
    )
    found.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield found
    finally:
        server.stop(None).wait()


def _second(message: Any) -> Any:
    """Return field 2: the scopes of a resource, or the spans or records of a scope.

    Releases of xds-protos, where these messages come from, have other names for it than OpenTelemetry has now.
    """
    return getattr(message, message.DESCRIPTOR.fields_by_number[2].name)


def _write(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _span(span: Any) -> Span:
    return Span(span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), _texts(span.attributes))


def _texts(attributes: Any) -> dict[str, str]:
    return {each.key: each.value.string_value for each in attributes}
