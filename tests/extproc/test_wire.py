"""The protocol on the wire, message by message, over real gRPC. One id for each rule.

The endpoint-picker protocol has its own, in ``test_wire_picks.py``. Left out: passing unknown paths on unparsed (here
they are refused on purpose); trace context (Envoy's); gRPC status of refusals (no gRPC clients).
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode as Mode
from envoy_data_plane.envoy.service.ext_proc.v3 import ProcessingRequest

from dp_extproc import contract
from dp_extproc.attempt.replies import CHUNK_BYTES
from dp_extproc.config.reliability import RetrySettings
from dp_extproc.engines.model import Role
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Answer, Decision
from extproc.wire import (
    GET,
    POST,
    Server,
    headers_of,
    kind_of,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    run_server,
)
from fleet_fixtures import Fleet, make_facts

BODY = b'{"model":"m","prompt":"hello"}'
DUPLEX, BUFFERED = Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])


@pytest.fixture
def server(fleet: Fleet) -> Iterator[Server]:
    with run_server(fleet.scheduler) as server:
        yield server


@contextmanager
def closed_by_status(code: grpc.StatusCode) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as ended:
        yield
    assert ended.value.code() is code


class TestLockStep:
    """Bodies come BUFFERED: one answer to each message, of the same kind, in order."""

    def test_01_one_answer_to_each_message(self, server: Server) -> None:
        """A whole exchange, with every phase that Envoy can send."""
        stream = server.stream()
        kinds = [
            kind_of(stream.ask(message))
            for message in (
                request_headers(mode=BUFFERED),
                request_body(BODY),
                response_headers(),
                response_body(b"{}", end=True),
                response_trailers(),
            )
        ]

        assert kinds == ["request_headers", "request_body", "response_headers", "response_body", "response_trailers"]
        assert stream.close() == []

    @pytest.mark.parametrize("mode", [BUFFERED, None], ids=["said", "not said: an old Envoy"])
    def test_03_mode_of_the_first_message(self, server: Server, mode: Mode | None) -> None:
        """Lock-step is read from the first message, and is the default."""
        stream = server.stream()

        assert kind_of(stream.ask(request_headers(mode=mode))) == "request_headers"
        answer = stream.ask(request_body(BODY)).request_body
        assert answer is not None
        assert answer.response.body_mutation.body

    def test_04_headers_are_answered_before_the_body_comes(self, server: Server) -> None:
        """Holding them back would wait for Envoy while Envoy waits; no routing header is set yet."""
        answer = server.stream().ask(request_headers(mode=BUFFERED))

        assert headers_of(answer) == {}

    def test_09_routing_headers_in_the_body_answer(self, server: Server) -> None:
        """In lock-step they take effect there, and only there the pick is known."""
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))
        headers = headers_of(stream.ask(request_body(BODY)))

        assert headers[contract.PREFILL_HOST] == b"10.0.0.1:31001"
        assert headers[contract.DECODE_HOST] == b"10.0.0.1:32001"

    def test_10_the_route_is_chosen_anew(self, server: Server) -> None:
        """The route cache is cleared in an answer that sets headers, and in no other."""
        stream = server.stream()
        first = stream.ask(request_headers(mode=BUFFERED)).request_headers
        second = stream.ask(request_body(BODY)).request_body

        assert first is not None
        assert first.response is None or not first.response.clear_route_cache
        assert second is not None
        assert second.response.clear_route_cache

    def test_13_no_forbidden_header_is_set(self, server: Server) -> None:
        """Envoy rejects changes of host, method and the like; ours are all our own, but for the length."""
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))
        headers = headers_of(stream.ask(request_body(BODY)))

        assert {name for name in headers if not name.startswith(contract.OWNED_PREFIX)} == {"content-length"}

    @pytest.mark.parametrize("announced", [{"content-length": str(len(BODY))}, {}], ids=["with length", "chunked"])
    def test_14_content_length_is_that_of_the_new_body(self, server: Server, announced: dict[str, str]) -> None:
        """A length that does not match the new body would be rejected."""
        stream = server.stream()
        stream.ask(request_headers({**POST, **announced}, mode=BUFFERED))
        message = stream.ask(request_body(BODY))
        answer = message.request_body

        assert answer is not None
        assert headers_of(message)["content-length"] == str(len(answer.response.body_mutation.body)).encode()

    def test_15_metadata_for_the_access_log(self, server: Server) -> None:
        """The pick is in dynamic metadata under our namespace."""
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))
        metadata = stream.ask(request_body(BODY)).dynamic_metadata

        assert metadata is not None
        assert metadata.to_dict()[contract.METADATA_NAMESPACE]["model"] == "m"

    def test_17_headers_of_ours_from_a_client_are_removed(self, server: Server) -> None:
        """The first reply removes them, whatever has let them through."""
        untrusted = {"x-dp-decode-host": "1.2.3.4:5", "x-override-rid": "x", "x-data-parallel-rank": "1"}
        answer = server.stream().ask(request_headers({**POST, **untrusted}, mode=BUFFERED)).request_headers

        assert answer is not None
        assert set(answer.response.header_mutation.remove_headers) == untrusted.keys()

    def test_20_the_body_is_replaced_whole(self, server: Server) -> None:
        """Not duplex: ``body``, never ``streamed_response``; the client's bytes stand behind ours."""
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))
        answer = stream.ask(request_body(BODY)).request_body

        assert answer is not None
        assert answer.response.body_mutation.streamed_response is None
        assert answer.response.body_mutation.body.endswith(BODY[1:])

    def test_22_buffered_body_before_trailers(self, server: Server) -> None:
        """A body that trailers follow does not end the stream; it is whole all the same."""
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))

        assert kind_of(stream.ask(request_body(BODY, end=False))) == "request_body"
        assert kind_of(stream.ask(request_trailers())) == "request_trailers"
        assert kind_of(stream.ask(response_headers())) == "response_headers"

    def test_28_a_large_body_in_one_message(self, server: Server) -> None:
        """32 MiB pass, where gRPC's own limit would be 4."""
        body = b'{"prompt":"' + b"x" * (32 << 20) + b'"}'
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))
        answer = stream.ask(request_body(body)).request_body

        assert answer is not None
        assert answer.response.body_mutation.body.endswith(body[1:])

    def test_36_trailers_without_a_body(self, server: Server) -> None:
        """Trailers without a body before them are an error of the client, and not of Envoy."""
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))
        answer = stream.ask(request_trailers()).immediate_response

        assert json.loads(answer.body)["error"]["code"] == "empty_body"

    @pytest.mark.parametrize(
        "messages",
        [
            pytest.param([request_body(BODY)], id="body first"),
            pytest.param([request_headers(mode=BUFFERED), request_headers(mode=BUFFERED)], id="headers twice"),
            pytest.param([response_trailers()], id="trailers first"),
        ],
    )
    def test_01_what_the_protocol_forbids_ends_the_stream(
        self, server: Server, messages: list[ProcessingRequest]
    ) -> None:
        """A violation is an error of Envoy's; the stream ends with INVALID_ARGUMENT."""
        stream = server.stream()
        stream.send(*messages)
        with closed_by_status(grpc.StatusCode.INVALID_ARGUMENT):
            stream.close()


class TestDuplex:
    """Bodies come FULL_DUPLEX_STREAMED: nothing is answered before the body is whole."""

    def _exchange(self, server: Server, *chunks: bytes, trailers: bool = False) -> list[Any]:
        stream = server.stream()
        stream.send(request_headers(mode=DUPLEX))
        for index, chunk in enumerate(chunks):
            stream.send(request_body(chunk, end=not trailers and index == len(chunks) - 1))
        if trailers:
            stream.send(request_trailers())
        return list(stream.close())

    def test_02_headers_then_body(self, server: Server) -> None:
        """The answers keep the order headers, body; routing headers go with the headers."""
        head, body = self._exchange(server, BODY[:7], BODY[7:])

        assert kind_of(head) == "request_headers"
        assert headers_of(head)[contract.DECODE_HOST] == b"10.0.0.1:32001"
        assert kind_of(body) == "request_body"

    def test_09_no_header_mutation_in_body_answers(self, server: Server) -> None:
        """In duplex they would be ignored."""
        _, body = self._exchange(server, BODY)

        assert headers_of(body) == {}

    def test_14_no_content_length(self, server: Server) -> None:
        """Envoy itself removes the length of a streamed body."""
        head, _ = self._exchange(server, BODY)

        assert "content-length" not in headers_of(head)

    def test_20_only_streamed_responses(self, server: Server) -> None:
        """Never ``body``, and no empty acknowledgements."""
        _, *bodies = self._exchange(server, b"", BODY[:3], b"", BODY[3:], b"")

        assert len(bodies) == 1
        assert not bodies[0].request_body.response.body_mutation.body
        assert bodies[0].request_body.response.body_mutation.streamed_response.body.endswith(BODY[1:])

    @pytest.mark.parametrize(
        ("length", "count"),
        [(CHUNK_BYTES, 1), (CHUNK_BYTES + 1, 2), (2 * CHUNK_BYTES, 2), (2 * CHUNK_BYTES + 1000, 3)],
    )
    def test_21_chunks(self, server: Server, length: int, count: int) -> None:
        """Chunks of at most 62,000 bytes; only the last one ends the stream."""
        empty = len(self._joined(self._exchange(server, b'{"prompt":""}')[1:]))
        _, *bodies = self._exchange(server, b'{"prompt":"' + b"x" * (length - empty) + b'"}')
        streamed = [body.request_body.response.body_mutation.streamed_response for body in bodies]

        # Rooms differ in length by a digit or two, so an exact fit may be a few bytes off.
        assert len(streamed) in {count, -(-(length + 3) // CHUNK_BYTES), -(-(length - 3) // CHUNK_BYTES)}
        assert all(len(chunk.body) == CHUNK_BYTES for chunk in streamed[:-1])
        assert 0 < len(streamed[-1].body) <= CHUNK_BYTES
        assert [chunk.end_of_stream for chunk in streamed] == [False] * (len(streamed) - 1) + [True]

    @staticmethod
    def _joined(bodies: list[Any]) -> bytes:
        return b"".join(body.request_body.response.body_mutation.streamed_response.body for body in bodies)

    def test_22_trailers_end_the_body(self, server: Server) -> None:
        """Then no chunk ends the stream, and the trailers are answered last."""
        head, body, trailers = self._exchange(server, BODY, trailers=True)

        assert [kind_of(message) for message in (head, body, trailers)] == [
            "request_headers",
            "request_body",
            "request_trailers",
        ]
        assert not body.request_body.response.body_mutation.streamed_response.end_of_stream

    def test_23_split_at_every_byte(self, server: Server) -> None:
        """JSON and UTF-8 may be split anywhere."""
        sent = '{"prompt":"é🗼\\u00e9"}'.encode()
        _, *bodies = self._exchange(server, *(sent[index : index + 1] for index in range(len(sent))))

        assert json.loads(self._joined(bodies))["prompt"] == "é🗼é"

    def test_36_refusals_are_immediate_responses(self, server: Server) -> None:
        """A refusal after the body has been held is an answer to the client, not an error of the stream."""
        (answer,) = self._exchange(server, b"[]")

        assert answer.immediate_response.status.code == 400

    def test_36_a_body_that_stops_coming(self, fleet: Fleet) -> None:
        """Envoy has no timeout in this mode, so the service has one: 408."""
        with run_server(fleet.scheduler, hold_seconds=0.05) as server:
            stream = server.stream()
            stream.send(request_headers(mode=DUPLEX), request_body(BODY[:5], end=False))
            answer = stream.receive()

            assert answer.immediate_response is not None
            assert answer.immediate_response.status.code == 408
            assert stream.close() == []

    def test_39_response_chunks_pass_one_for_one(self, server: Server) -> None:
        """Where responses are sent in duplex, too, every chunk comes back as it was."""
        config = ProcessingRequest(response_headers=response_headers().response_headers)
        config.protocol_config = request_headers(mode=DUPLEX).protocol_config
        assert config.protocol_config is not None
        config.protocol_config.response_body_mode = DUPLEX
        stream = server.stream()
        assert kind_of(stream.ask(config)) == "response_headers"
        for data, end in ((b"data: 1\n\n", False), (b"", False), (b"data: 2\n\n", True)):
            answer = stream.ask(response_body(data, end=end)).response_body
            assert answer is not None
            chunk = answer.response.body_mutation.streamed_response
            assert (chunk.body, chunk.end_of_stream) == (data, end)


@pytest.mark.parametrize("mode", [BUFFERED, DUPLEX, Mode.NONE], ids=lambda mode: mode.name)
class TestAnyMode:
    """What holds however bodies come."""

    def test_05_a_stream_that_begins_with_the_response(self, server: Server, mode: Mode) -> None:
        """Envoy or an earlier filter answered by itself: let it pass."""
        first = response_headers(503)
        first.protocol_config = request_headers(mode=mode).protocol_config
        stream = server.stream()

        assert kind_of(stream.ask(first)) == "response_headers"
        assert stream.close() == []

    def test_07_observability_mode_gets_no_answer(self, server: Server, mode: Mode) -> None:
        """A reply would be a violation of the protocol."""
        stream = server.stream()
        stream.send(request_headers(mode=mode, observability_mode=True))

        assert stream.close() == []

    def test_08_nothing_after_an_immediate_response(self, server: Server, mode: Mode) -> None:
        """Whatever Envoy still sends is met with silence."""
        stream = server.stream()
        refusal = stream.ask(request_headers({**POST, ":path": "/nope"}, mode=mode))
        stream.send(request_body(BODY), response_headers(404))

        assert kind_of(refusal) == "immediate_response"
        assert stream.close() == []

    def test_26_a_get_needs_headers_only(self, server: Server, mode: Mode) -> None:
        """One answer, with a host and without a mirror."""
        stream = server.stream()
        headers = headers_of(stream.ask(request_headers(GET, end=True, mode=mode)))

        assert headers == {contract.DECODE_HOST: b"10.0.0.1:32001"}
        assert kind_of(stream.ask(response_headers())) == "response_headers"

    @pytest.mark.parametrize(
        ("headers", "status", "reason"),
        [
            pytest.param({":path": "/nope"}, 404, "unknown_path", id="31-unknown path"),
            pytest.param({":method": "GET"}, 405, "method_not_allowed", id="31-method"),
            pytest.param({"content-encoding": "gzip"}, 415, "compressed_body", id="29-compressed"),
            pytest.param({"content-type": "text/plain"}, 415, "unsupported_media_type", id="27-not json"),
            pytest.param({"content-length": str(1 << 40)}, 413, "body_too_large", id="28-too large"),
        ],
    )
    def test_refused_before_the_body(
        self, server: Server, mode: Mode, headers: dict[str, str], status: int, reason: str
    ) -> None:
        """35, 37: a JSON body, the reason as a header, as details and as metadata; no traceback."""
        message = server.stream().ask(request_headers({**POST, **headers}, mode=mode))
        answer = message.immediate_response

        assert answer is not None
        assert answer.status is not None
        assert (answer.status.code, answer.details) == (status, reason)
        assert json.loads(answer.body)["error"]["code"] == reason
        assert headers_of(message)["content-type"] == b"application/json"
        assert headers_of(message)["x-dp-extproc-reason"] == reason.encode()
        assert message.dynamic_metadata is not None
        assert message.dynamic_metadata.to_dict()[contract.METADATA_NAMESPACE] == {"reason": reason}

    def test_36_a_body_announced_but_absent(self, server: Server, mode: Mode) -> None:
        """A POST without a body is refused at once."""
        answer = server.stream().ask(request_headers(end=True, mode=mode)).immediate_response

        assert answer is not None
        assert json.loads(answer.body)["error"]["code"] == "empty_body"


@pytest.mark.parametrize(
    "mode", [Mode.NONE, Mode.STREAMED, Mode.BUFFERED_PARTIAL, Mode.GRPC], ids=lambda mode: mode.name
)
def test_unsupported_body_modes_are_refused(server: Server, mode: Mode) -> None:
    """A filter that sends bodies otherwise gets an error with the reason instead of a hang."""
    answer = server.stream().ask(request_headers(mode=mode)).immediate_response

    assert answer is not None
    assert json.loads(answer.body)["error"]["code"] == "unsupported_body_mode"


class TestReservations:
    """All reservations end with the stream, however it ends."""

    def _tokens(self, fleet: Fleet) -> tuple[float, float]:
        return fleet.endpoint(Role.PREFILL).tokens, fleet.endpoint(Role.DECODE).tokens

    @pytest.mark.parametrize("ending", ["half-close", "cancel", "violation"])
    def test_06_released_at_the_end(self, server: Server, fleet: Fleet, ending: str) -> None:
        """A client that leaves, a response that ends and a violation of the protocol release all reservations."""
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))
        stream.ask(request_body(BODY))
        held = self._tokens(fleet)
        if ending == "half-close":
            stream.close()
        elif ending == "cancel":
            stream.cancel()
        else:
            with closed_by_status(grpc.StatusCode.INVALID_ARGUMENT):
                stream.send(request_headers(mode=BUFFERED))
                stream.close()
        deadline = time.monotonic() + 10
        while self._tokens(fleet) != (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.005)

        assert min(held) > 0

    def test_leg_releases_the_reservations_of_prefill(self, server: Server, fleet: Fleet) -> None:
        """Found by the leg's token in the initial metadata; prefill's tokens go, decode's stay."""
        main = server.stream()
        main.ask(request_headers(mode=BUFFERED))
        token = headers_of(main.ask(request_body(BODY)))[contract.LEG].decode()
        leg = server.stream(x_dp_leg=token)
        assert kind_of(leg.ask(response_headers(200))) == "response_headers"
        assert leg.close() == []
        prefill, decode = self._tokens(fleet)

        assert prefill == 0
        assert decode > 0
        assert main.close() == []

    @pytest.mark.parametrize("token", ["0" * 24, "x", "é".encode().hex()])
    def test_leg_with_an_unknown_token_passes(self, server: Server, token: str) -> None:
        """A leg of a request that is over, or of another process, has no effect."""
        leg = server.stream(x_dp_leg=token)

        assert kind_of(leg.ask(response_headers(200))) == "response_headers"
        assert leg.close() == []


class _Broken:
    """A decider with a bug."""

    def place(self, *_request: object, **_more: object) -> Decision | Rejection:
        raise RuntimeError("secret detail")

    def lost(self, address: str) -> None:
        raise NotImplementedError

    def suspect(self, url: str) -> None:
        pass

    def contradicted(self, url: str, why: str) -> None:
        pass

    def engine_lost(self, fingerprint: str, address: str) -> None:
        raise NotImplementedError

    def place_unread(self, *_request: object) -> Decision | Rejection:
        raise RuntimeError("secret detail")

    def place_queued(self, *_request: object) -> Decision | Rejection:
        raise RuntimeError("secret detail")

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        raise RuntimeError("secret detail")

    def pass_on(self, *_request: object) -> Decision | Rejection:
        raise RuntimeError("secret detail")

    def models(self, path: str) -> Answer | Rejection:
        raise RuntimeError("secret detail")


@pytest.mark.parametrize("mode", [BUFFERED, DUPLEX], ids=lambda mode: mode.name)
def test_35_an_unexpected_error_is_a_500_with_an_id(mode: Mode, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets an id, and the log has the cause under that id."""
    with run_server(_Broken()) as server:
        stream = server.stream()
        stream.send(request_headers(mode=mode), request_body(BODY))
        answer = stream.close()[-1].immediate_response

    assert answer is not None
    assert answer.status is not None
    assert answer.status.code == 500
    assert b"secret" not in answer.body
    error_id = json.loads(answer.body)["error"]["message"].split()[-1]
    assert error_id in caplog.text
    assert "secret detail" in caplog.text


def test_decisions_are_reported_to_the_listener(server: Server) -> None:
    """Each request counts once, by what became of it."""
    routed = server.stream()
    routed.ask(request_headers(mode=BUFFERED))
    routed.ask(request_body(BODY))
    routed.ask(response_headers())
    routed.close()
    server.stream().ask(request_headers(GET, end=True, mode=BUFFERED))
    server.stream().ask(request_headers({**GET, ":path": "/v1/models"}, end=True, mode=BUFFERED))
    server.stream().ask(request_headers({**POST, ":path": "/nope"}, mode=BUFFERED))

    assert server.watcher.decisions == ["routed", "routed", "answered", "unknown_path"]


class TestRepetitionByEnvoy:
    """Envoy itself repeats a request whose server was lost behind the head that is held here."""

    AGAIN = request_headers({**POST, contract.AVOID: "10.0.0.1:31001,10.0.0.1:32001,cut"}, mode=BUFFERED)

    def test_repetition_is_counted_as_a_failure(self, fleet: Fleet) -> None:
        """As a failure of the server that answered, and as a retry."""
        with run_server(fleet.scheduler) as server:
            stream = server.stream()
            assert kind_of(stream.ask(self.AGAIN)) == "request_headers"
            assert kind_of(stream.ask(request_body(BODY))) == "request_body"
            stream.close()

        assert server.watcher.failures == [(Role.DECODE, Reason.DECODE_FAILED, True)]
        assert [fleet.endpoint(role).health.failures > 0 for role in (Role.PREFILL, Role.DECODE)] == [False, True]

    def test_repetition_is_refused_without_budget(self, fleet: Fleet) -> None:
        """In a storm it must not multiply the load, whoever asks for it."""
        with run_server(fleet.scheduler, retry=RetrySettings(burst=1, budget=0)) as server:
            assert kind_of(server.stream().ask(self.AGAIN)) == "request_headers"
            answer = server.stream().ask(self.AGAIN)

        assert answer.immediate_response.status.code.value == 502
        assert server.watcher.decisions == ["decode_failed"]
        assert server.watcher.failures[1:] == [(Role.DECODE, Reason.DECODE_FAILED, False)]


class TestNoBodies:
    """Bodies are not sent, and the pool's engines obey headers: the headers' answer routes."""

    @pytest.fixture
    def fleet_without_bodies(self) -> Fleet:
        """The only pool needs no bodies."""
        facts = {role: replace(make_facts(role), reads_overrides=True) for role in (Role.PREFILL, Role.DECODE)}
        policy = {"affinity": {"prefixes": False}}
        return Fleet(
            prefills=[facts[Role.PREFILL]], decodes=[facts[Role.DECODE]], policy=policy, routing_fields="headers"
        )

    @pytest.fixture
    def server(self, fleet_without_bodies: Fleet) -> Iterator[Server]:
        with run_server(fleet_without_bodies.scheduler) as server:
            yield server

    def test_01_one_answer_to_each_message(self, server: Server) -> None:
        """Headers, and the response; the body passes by."""
        stream = server.stream()
        message = stream.ask(request_headers({**POST, ":path": "/generate", "content-length": "100"}, mode=Mode.NONE))
        headers, answer = headers_of(message), message.request_headers

        assert answer is not None
        assert answer.response.clear_route_cache
        assert answer.response.body_mutation is None
        assert headers.keys() >= {
            contract.DECODE_HOST,
            contract.PREFILL_HOST,
            contract.OVERRIDE_RANK,
            contract.PREFILL_RANK,
        }
        assert contract.PREFILL_PREFIX not in headers
        assert kind_of(stream.ask(response_headers())) == "response_headers"
        assert kind_of(stream.ask(response_trailers())) == "response_trailers"
        assert stream.close() == []

    def test_17_headers_of_clients_are_replaced_or_removed(self, server: Server) -> None:
        """One that is set here is not removed again."""
        untrusted = {contract.OVERRIDE_RANK: "99", "x-override-priority": "9", "x-dp-evil": "1"}
        message = server.stream().ask(request_headers({**POST, ":path": "/generate", **untrusted}, mode=Mode.NONE))
        answer = message.request_headers

        assert answer is not None
        assert set(answer.response.header_mutation.remove_headers) == untrusted.keys() - {contract.OVERRIDE_RANK}
        assert headers_of(message)[contract.OVERRIDE_RANK] in {b"0", b"1", b"2", b"3"}

    def test_repetition_is_refused_before_scheduling_without_budget(self, fleet_without_bodies: Fleet) -> None:
        """It is refused before it is scheduled, and leaves no reservation."""
        again = {**POST, ":path": "/generate", contract.AVOID: "10.0.0.1:31001,10.0.0.1:32001,cut"}
        with run_server(fleet_without_bodies.scheduler, retry=RetrySettings(burst=1, budget=0)) as server:
            first = server.stream()
            assert kind_of(first.ask(request_headers(again, mode=Mode.NONE))) == "request_headers"
            first.close()
            second = server.stream()
            answer = second.ask(request_headers(again, mode=Mode.NONE))
            assert second.close() == []

        assert answer.immediate_response.status.code.value == 502
        assert not fleet_without_bodies.endpoint(Role.PREFILL).reservations
        assert not fleet_without_bodies.endpoint(Role.DECODE).reservations

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
    def test_31_paths_that_read_no_headers(self, server: Server, path: str) -> None:
        """They are refused at once."""
        answer = server.stream().ask(request_headers({**POST, ":path": path}, mode=Mode.NONE)).immediate_response

        assert answer is not None
        assert json.loads(answer.body)["error"]["code"] == "path_cannot_carry_routing_fields"

    def test_bodies_are_read_when_envoy_sends_them_against_the_configuration(self, server: Server) -> None:
        """An Envoy that sends them, against the configuration, gets what headers cannot carry into them."""
        stream = server.stream()
        stream.ask(request_headers(mode=BUFFERED))
        answer = stream.ask(request_body(BODY)).request_body

        assert answer is not None
        assert answer.response.body_mutation.body.endswith(BODY[1:])
