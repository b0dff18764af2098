"""Raw engine responses with steering headers in unusual places, which no HTTP library would send."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import pytest

from dp_extproc import contract
from envoy_config.harness import BODY, Bench

STEERING_HEADERS: Final = {
    "ours": f"{contract.RETRY}: 1\r\n{contract.FAILED}: -,10.0.0.9:1,cut\r\n".encode(),
    "Envoy's": b"x-envoy-ratelimited: true\r\nx-envoy-overloaded: true\r\n",
}
HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
WHOLE: Final = HEAD + b"content-length: 2\r\n\r\nok"
CHUNKED: Final = b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n"
PLACES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "in its headers": lambda extra: HEAD + extra + b"content-length: 2\r\n\r\nok",
    "in capitals": lambda extra: HEAD + extra.upper() + b"content-length: 2\r\n\r\nok",
    "in 100 Continue": lambda extra: b"HTTP/1.1 100 Continue\r\n" + extra + b"\r\n" + WHOLE,
    "in 103 Early Hints": lambda extra: b"HTTP/1.1 103 Early Hints\r\n" + extra + b"\r\n" + WHOLE,
    "in trailers": lambda extra: HEAD + CHUNKED + extra + b"\r\n",
    "in trailers that it announces": lambda extra: HEAD + b"trailer: x-dp-retry\r\n" + CHUNKED + extra + b"\r\n",
}


@dataclass
class RawEngine:
    """An engine that responds to every request with the same bytes."""

    answer: bytes
    address: str
    requests: list[bytes] = field(default_factory=list)

    def serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    head = b""
                    while b"\r\n\r\n" not in head and (data := connection.recv(65536)):
                        head += data
                    self.requests.append(head)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # Closing with unread bytes would be a reset.
                        pass


@contextmanager
def run_raw_engine(answer: bytes) -> Iterator[RawEngine]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        engine = RawEngine(answer, f"127.0.0.1:{listener.getsockname()[1]}")
        thread = threading.Thread(target=engine.serve, args=(listener,))
        thread.start()
        try:
            yield engine
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.mark.parametrize("leg", ["decode", "prefill", "one server"])
@pytest.mark.parametrize("extra", STEERING_HEADERS.values(), ids=STEERING_HEADERS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_no_part_of_an_engine_response_steers_envoy(
    bench: Bench, place: Callable[[bytes], bytes], extra: bytes, leg: str
) -> None:
    """Each leg is sent once, and the client gets none of the steering headers."""
    with run_raw_engine(place(extra)) as engine:
        unmirrored = {"test_one_server": "1"} if leg == "one server" else {}
        host = "test_prefill_host" if leg == "prefill" else "test_decode_host"
        request_id, response = bench.post(BODY, **unmirrored, **{host: engine.address})
        bench.log_line(request_id, "main" if leg == "one server" else "prefill")

        assert response.status_code == 200
        assert len(engine.requests) == 1
        if leg != "prefill":
            assert response.text == "ok"
        steering = [name for name in response.headers if name.startswith(("x-dp-", "x-envoy-"))]
        assert steering == []
