"""The WebAssembly filter that ends truncated streams, in a runtime that takes Envoy's place."""

import re
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasmtime import Func, FuncType, Instance, Memory, Module, Store, ValType

DOWNSTREAM_DATA, UPSTREAM_DATA = 2, 3
_IMPORTS = {
    "proxy_get_buffer_bytes": [ValType.i32] * 5,
    "proxy_set_buffer_bytes": [ValType.i32] * 5,
    "proxy_define_metric": [ValType.i32] * 4,
    "proxy_increment_metric": [ValType.i32, ValType.i64],
}
"""Parameters of the functions that the filter imports. Each returns a status."""
TEXT = b"the server that was answering was lost; the answer is not complete"


def ending(data: bytes) -> bytes:
    """Format an error event and the end of the body."""
    event = b"event: error\ndata: " + data + b"\n\n"
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


_ERROR = b'"error":{"message":"' + TEXT + b'","type":"server_error","param":null,"code":"stream_cut"}'
ERROR_END = ending(b'{"type":"error",' + _ERROR + b"}")
MESSAGES_END = ending(b'{"type":"error","error":{"type":"api_error","message":"' + TEXT + b'"}}')


def responses_end(events: int) -> bytes:
    """Format the end of a stream of the responses API that has had so many events."""
    flat = b'"message":"' + TEXT + b'","param":null,"code":"stream_cut","sequence_number":%d' % events
    return ending(b'{"type":"error",' + _ERROR + b"," + flat + b"}")


class WasmHost:
    """The host of the filter in the sense of proxy-wasm: it takes the place of Envoy."""

    def __init__(self) -> None:
        self.cut_streams = 0
        self._store = Store()
        module = Module(self._store.engine, files("dp_extproc.envoy_config").joinpath("stream_end.wasm").read_bytes())
        functions = []
        for each in module.imports:
            kind = FuncType([make() for make in _IMPORTS[each.name or ""]], [ValType.i32()])
            functions.append(Func(self._store, kind, getattr(self, f"_{each.name}")))
        self._exports = Instance(self._store, module, functions).exports(self._store)
        memory = self._exports["memory"]
        assert isinstance(memory, Memory)
        self._memory = memory
        self._data = bytearray()
        self._request = b""
        self.call("proxy_on_context_create", 1, 0)
        assert self.call("proxy_on_vm_start", 1, 0) == 1
        assert self.call("proxy_on_configure", 1, 0) == 1

    def call(self, name: str, *arguments: int) -> Any:
        function = self._exports[name]
        assert isinstance(function, Func)
        return function(self._store, *arguments)

    def pass_on(self, context: int, data: bytes, *, end: bool = False) -> bytes:
        """Pass a piece of a connection's data through the filter and return its output."""
        self._data = bytearray(data)
        assert self.call("proxy_on_upstream_data", context, len(data), int(end)) == 0
        return bytes(self._data)

    def send(self, context: int, request: bytes) -> None:
        """Pass a piece of a request through the filter."""
        self._request = request
        assert self.call("proxy_on_downstream_data", context, len(request), 0) == 0

    def connection(self, context: int, pieces: list[bytes]) -> bytes:
        """Pass a whole connection, which the engine then closes, and return the output."""
        self.call("proxy_on_context_create", context, 1)
        passed = b"".join(self.pass_on(context, piece) for piece in pieces) + self.pass_on(context, b"", end=True)
        self.call("proxy_on_delete", context)
        return passed

    def _proxy_get_buffer_bytes(self, kind: int, start: int, size: int, where: int, length: int) -> int:
        assert start == 0
        data = self._data if kind == UPSTREAM_DATA else self._request[:size]
        assert (kind == DOWNSTREAM_DATA) or size == len(data)
        at = self.call("proxy_on_memory_allocate", len(data))
        self._memory.write(self._store, data, at)
        self._memory.write(self._store, at.to_bytes(4, "little"), where)
        self._memory.write(self._store, len(data).to_bytes(4, "little"), length)
        return 0

    def _proxy_set_buffer_bytes(self, kind: int, start: int, size: int, data: int, length: int) -> int:
        assert (kind, start, size) == (UPSTREAM_DATA, len(self._data), 0)
        self._data += self._memory.read(self._store, data, data + length)
        return 0

    def _proxy_define_metric(self, kind: int, name: int, length: int, found: int) -> int:
        assert (kind, self._memory.read(self._store, name, name + length)) == (0, bytearray(b"dp_extproc_cut_streams"))
        self._memory.write(self._store, (7).to_bytes(4, "little"), found)
        return 0

    def _proxy_increment_metric(self, metric: int, by: int) -> int:
        assert metric == 7
        self.cut_streams += by
        return 0


@pytest.fixture(scope="module")
def host() -> WasmHost:
    return WasmHost()


def stream(*events: bytes, end: bool = False, head: bytes = b"Content-Type: text/event-stream; charset=utf-8") -> bytes:
    """Format a chunked response as uvicorn does."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    return b"HTTP/1.1 200 OK\r\n" + head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n" * end


WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n" + b'{"a": "b"}\n'
FIRST = b'data: {"n": 1}\n\n'
LONG = b"data: " + b"x" * 5000 + b"\n\n"
DONE = b"data: [DONE]\n\n"

TRUNCATED: dict[str, tuple[bytes, bytes]] = {
    "after its head": (stream(), ERROR_END),
    "after an event": (stream(FIRST), ERROR_END),
    "after a long event": (stream(FIRST, LONG), ERROR_END),
    "after other answers": (WHOLE + stream(FIRST, DONE, end=True) + stream(FIRST), ERROR_END),
    "after an interim answer": (b"HTTP/1.1 100 Continue\r\n\r\n" + stream(FIRST), ERROR_END),
    "after an answer without a body": (b"HTTP/1.1 204 No Content\r\n\r\n" + stream(FIRST), ERROR_END),
    "after an empty answer": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n" + stream(FIRST), ERROR_END),
    "after its last event": (stream(FIRST, DONE), b"0\r\n\r\n"),
    "after the last event of a message": (stream(FIRST, b"event: message_stop\ndata: {}\n\n"), b"0\r\n\r\n"),
    "after the last event of a response": (stream(FIRST, b"event: response.completed\ndata: {}\n\n"), b"0\r\n\r\n"),
    "after an error of the engine": (stream(FIRST, b"event: error\ndata: {}\n\n"), b"0\r\n\r\n"),
    "in the middle of a chunk": (stream(FIRST, FIRST)[:-6], b""),
    "before the line end of a chunk": (stream(FIRST)[:-2], b""),
    "in the size of a chunk": (stream(FIRST) + b"1", b""),
    "in its head": (stream()[:-2], b""),
    "after its end": (stream(FIRST, end=True), b""),
    "in its last chunk": (stream(FIRST) + b"0\r\n", b""),
    "in a whole answer": (WHOLE[:-3], b""),
    "after a whole answer": (WHOLE, b""),
    "in a chunked answer that is no stream": (stream(FIRST, head=b"content-type: application/json"), b""),
    "in a stream without chunks": (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + FIRST, b""),
    "before anything": (b"", b""),
    "in noise": (b"\x16\x03\x01\x00\xa5 not HTTP \xff\xfe\r\n\r\n", b""),
}


@pytest.mark.parametrize("case", TRUNCATED)
def test_filter_ends_a_stream_if_the_engine_closes_between_chunks(host: WasmHost, case: str) -> None:
    """It appends an error event and the end of the body between two chunks of a stream, and nothing elsewhere."""
    data, appended = TRUNCATED[case]
    before = host.cut_streams

    assert host.connection(2, [data]) == data + appended
    assert host.cut_streams - before == (appended == ERROR_END)


@given(case=st.sampled_from(sorted(TRUNCATED)), cuts=st.lists(st.integers(1, 400), max_size=12))
def test_filter_output_does_not_depend_on_how_data_is_split(host: WasmHost, case: str, cuts: list[int]) -> None:
    """The exception is the last event, which the filter recognizes only in one piece."""
    data, appended = TRUNCATED[case]
    pieces, rest = [], data
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    passed = host.connection(3, [*pieces, rest])

    assert passed in ({data + appended, data + ERROR_END} if appended == b"0\r\n\r\n" else {data + appended})


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_filter_passes_arbitrary_bytes_on(host: WasmHost, data: bytes, cut: int) -> None:
    """Bytes that are not HTTP have no effect."""
    passed = host.connection(4, [data[:cut], data[cut:]])

    assert passed.startswith(data)
    assert re.fullmatch(rb"|.*0\r\n\r\n", passed[len(data) :], re.DOTALL)


def test_filter_keeps_the_state_of_connections_apart(host: WasmHost) -> None:
    """Connections may share a bucket of its table, and a closed one leaves it."""
    contexts = [10, 10 + 1024, 10 + 2048, 11, 12]
    for context in contexts:
        host.call("proxy_on_context_create", context, 1)
        host.pass_on(context, stream(FIRST, end=context % 2 == 1))
    host.call("proxy_on_delete", 10 + 1024)

    ends = {context: host.pass_on(context, b"", end=True) for context in contexts}
    assert ends == {10: ERROR_END, 10 + 1024: b"", 10 + 2048: ERROR_END, 11: b"", 12: ERROR_END}
    for context in contexts:
        host.call("proxy_on_delete", context)


@pytest.mark.parametrize(
    ("request_line", "appended"),
    [
        pytest.param(b"POST /v1/chat/completions HTTP/1.1\r\n", ERROR_END, id="chat"),
        pytest.param(b"POST /v1/messages HTTP/1.1\r\n", MESSAGES_END, id="messages"),
        pytest.param(b"POST /v1/messages?beta=true HTTP/1.1\r\n", MESSAGES_END, id="messages with a query"),
        pytest.param(b"POST /v1/responses HTTP/1.1\r\n", responses_end(12), id="responses"),
        pytest.param(b"POST", ERROR_END, id="in pieces"),
    ],
)
def test_filter_ends_a_stream_in_the_form_of_its_path(host: WasmHost, request_line: bytes, appended: bytes) -> None:
    """The path is that of the last request of the connection, whatever its body and the answers before have."""
    host.call("proxy_on_context_create", 5, 1)
    host.send(5, b"POST /v1/messages HTTP/1.1\r\nx: y\r\n\r\n{}")
    host.pass_on(5, WHOLE)
    host.send(5, request_line + b"host: a\r\n\r\n")
    host.send(5, b"POST /v1/messages HTTP/1.1\r\n of a body")
    host.pass_on(5, b"HTTP/1.1 100 Continue\r\n\r\n")
    host.send(5, b"POST /v1/messages HTTP/1.1\r\n of a body")
    host.pass_on(5, stream(*[FIRST] * 12))

    assert host.pass_on(5, b"", end=True) == appended
    host.call("proxy_on_delete", 5)
