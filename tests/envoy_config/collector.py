"""A collector of spans and logs: OpenTelemetry's by gRPC, and Envoy's access log service."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from envoy.service.accesslog.v3 import als_pb2
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc as logs_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as traces_grpc


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

    class Traces(traces_grpc.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - gRPC's
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    found.spans.extend(map(_span, scope.spans))
            return traces.ExportTraceServiceResponse()

    class Logs(logs_grpc.LogsServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - gRPC's
            for resource in request.resource_logs:
                for scope in resource.scope_logs:
                    found.records.extend(_texts(each.attributes) for each in scope.log_records)
            return logs.ExportLogsServiceResponse()

    def entries(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        for message in messages:
            found.entries.extend(message.http_logs.log_entry)
        return als_pb2.StreamAccessLogsResponse()

    stream = grpc.stream_unary_rpc_method_handler(
        entries,
        request_deserializer=als_pb2.StreamAccessLogsMessage.FromString,
        response_serializer=als_pb2.StreamAccessLogsResponse.SerializeToString,
    )
    als = grpc.method_handlers_generic_handler(
        "envoy.service.accesslog.v3.AccessLogService", {"StreamAccessLogs": stream}
    )
    server = grpc.server(ThreadPoolExecutor(8))
    traces_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    logs_grpc.add_LogsServiceServicer_to_server(Logs(), server)
    server.add_generic_rpc_handlers((als,))
    found.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield found
    finally:
        server.stop(None).wait()


def _span(span: Any) -> Span:
    return Span(span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), _texts(span.attributes))


def _texts(attributes: Any) -> dict[str, str]:
    return {each.key: each.value.string_value for each in attributes}
