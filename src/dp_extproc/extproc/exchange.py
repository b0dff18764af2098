"""One ext_proc stream as a state machine: events in, replies out. No I/O, no protobuf.

Rules that live here and nowhere else:

- In lock-step every event gets exactly one reply of its own phase. Routing headers go with the body's reply, as
  the headers' reply is due before the body comes.
- Where bodies are not sent here, the headers decide, and are answered with the routing headers.
- In duplex nothing is answered until the whole body is in; then headers, chunks and trailers follow in this order.
  Routing headers go with the headers' reply, as those of a body reply are ignored.
- After an immediate response nothing is said any more, and none is sent once the response has begun.
- A stream may begin with the response (Envoy or an earlier filter answered by itself). It is let through.
"""

from enum import IntEnum, auto
from typing import Any, ClassVar, Final

from dp_extproc import contract
from dp_extproc.attempt.chunks import cut
from dp_extproc.attempt.decider import Decider
from dp_extproc.attempt.events import (
    BodyMode,
    BufferBody,
    Continue,
    Event,
    Mutate,
    Phase,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    StreamBody,
    StreamedChunk,
)
from dp_extproc.attempt.precheck import NO_BODY, refuse_by_headers, too_large
from dp_extproc.attempt.replies import Headers, answer_instead, refuse, route, tell_models
from dp_extproc.load.in_flight import InFlight
from dp_extproc.request.path import Api, Lookup, read_path
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.response.logprobs import Merger, make_merger
from dp_extproc.scheduling.admission import Ticket
from dp_extproc.scheduling.decision import Decision, Queued, RequestContext

_OK: Final = 200
_Replies = tuple[Reply, ...]


class ProtocolViolationError(Exception):
    """Envoy sent what the protocol does not allow here; the stream cannot be served."""


class _State(IntEnum):
    START = auto()
    BODY = auto()
    """The request's headers are in, its body is awaited."""
    WAITING = auto()
    """The request is complete, but there is no room for it; it may be decided again."""
    SENT = auto()
    """The request is on its way; the response is awaited."""
    HELD = auto()
    """The response's headers are in, and not let go yet."""
    REFUSING = auto()
    """The response is an error whose text is on its way here."""
    RESPONDING = auto()
    OVER = auto()
    """An immediate response was sent."""


class Exchange:
    """One request and its response."""

    __slots__ = (
        "_api",
        "_asks_for_body",
        "_body",
        "_decider",
        "_foreign",
        "_is_whole",
        "_length",
        "_max_body",
        "_merger",
        "_mode",
        "_picks",
        "_queued",
        "_response_mode",
        "_session",
        "_session_header",
        "_size",
        "_state",
        "_subset",
        "_trailers",
        "cut",
        "decision",
        "failed",
        "holds",
        "refusal",
        "status",
    )

    def __init__(
        self,
        decider: Decider,
        mode: BodyMode,
        max_body: int,
        *,
        response_mode: BodyMode = BodyMode.LOCKSTEP,
        holds: bool = False,
        picks: bool = False,
        session_header: str | None = contract.SESSION,
        subset: frozenset[str] | None = None,
    ) -> None:
        """Begin.

        Args:
            decider: Whom to ask.
            mode: ``protocol_config.request_body_mode`` of the stream's first message.
            max_body: Bytes; larger bodies are refused with 413.
            response_mode: Likewise of the response's body.
            holds: Whether the response's headers are held until :meth:`let_go`.
            picks: Whether to speak the endpoint-picker protocol: the gateway routes, and this only says where to.
                No header of ours is believed then, for nobody has removed the clients'.
            session_header: The header that names the conversation; None for none.
            subset: Among which endpoints it allows to choose; None for all.
        """
        self._decider = decider
        self._mode = mode
        self._max_body = max_body
        self._response_mode = response_mode
        self._picks = picks
        self._subset = subset
        self._state = _State.START
        self._api: Api | None = None
        self._foreign: tuple[str, ...] = ()
        self._session_header = session_header
        self._session: str | None = None
        self._body: list[bytes] = []
        self._length: int | None = None
        self._size = 0
        self._trailers = False
        self._is_whole = mode is BodyMode.NONE
        """Whether nothing more of the request will come here."""
        self._asks_for_body = False
        """Whether the response's body was asked for."""
        self.holds = holds
        self._queued: Queued | None = None
        self._merger: Merger | None = None
        self.failed: tuple[frozenset[str], ...] = ()
        """Hosts of each earlier attempt of the request."""
        self.cut: str | None = None
        """The server that the last one of them has lost, if that was not counted yet."""
        self.decision: Decision | None = None
        """Where the request goes, once it was placed."""
        self.status: int | None = None
        """Of the response, once it is known."""
        self.refusal: Reason | None = None

    def receive(self, event: Event) -> _Replies:
        """Take in an event.

        Returns:
            The replies that are due now, in order.

        Raises:
            ProtocolViolationError: The event is not allowed in this state.
        """
        if self._state is _State.OVER:
            return ()
        handler = self._TRANSITIONS.get((self._state, type(event)))
        if handler is None:
            raise ProtocolViolationError(f"{type(event).__name__} is not expected in state {self._state.name}")
        replies: _Replies = handler(self, event)
        return replies

    @property
    def attempt(self) -> InFlight | None:
        """What the request has on the books, once it was placed."""
        return None if self.decision is None else self.decision.in_flight

    @property
    def sees_answer(self) -> bool:
        """Whether Envoy sends the response's body when asked to; to streams in duplex it does not listen then."""
        return self._mode is not BodyMode.DUPLEX and not self._picks

    @property
    def awaits_prefill_text(self) -> bool:
        """Whether :meth:`merge_with` is to be called before the response's body is received."""
        return self._state is _State.RESPONDING and self._is_to_be_merged and self._merger is None

    @property
    def merge_problem(self) -> str | None:
        """Why the response, or a part of it, was not merged with prefill's."""
        return None if self._merger is None else self._merger.problem

    @property
    def is_waiting(self) -> bool:
        """Whether the request is complete and waits for room."""
        return self._state is _State.WAITING

    @property
    def queued(self) -> Queued | None:
        """Where the request waits."""
        return self._queued

    @property
    def is_responding(self) -> bool:
        """Whether the response's headers were let go."""
        return self._state is _State.RESPONDING

    @property
    def can_do_without(self) -> bool:
        """Whether Envoy lets the rest pass as it is if this stream ends now in good order.

        Where pieces of a body may be on their way here it would lose them.
        """
        sees_body = self._response_mode is not BodyMode.NONE or self._asks_for_body
        passes = self._state is _State.RESPONDING or (self._picks and self._state is _State.SENT)
        return passes and self._is_whole and not sees_body

    @property
    def can_be_abandoned(self) -> bool:
        """Whether the client can still get another answer than the engine's."""
        return self._state in {_State.SENT, _State.HELD, _State.REFUSING}

    @property
    def is_holding(self) -> bool:
        """Whether a request is held until the rest of its body has come."""
        return self._state is _State.BODY

    @property
    def is_decided(self) -> bool:
        """Whether the request was let through, answered or refused."""
        return self._state >= _State.SENT

    @property
    def is_routed(self) -> bool:
        """Whether the request was let through to an engine."""
        return _State.SENT <= self._state < _State.OVER

    def decide_again(self, ticket: Ticket) -> _Replies:
        """Try to place the request that waits, once more."""
        return self._decide(ticket) if self._state is _State.WAITING else ()

    def give_up(self) -> _Replies:
        """Refuse the request that waits."""
        assert self._queued is not None  # noqa: S101 - else it would not wait
        return self._refuse(self._queued.rejection) if self._state is _State.WAITING else ()

    def refuse_another_attempt(self) -> _Replies:
        """Refuse the request that has come again, before its body is here; or as it was placed, where none comes."""
        placed = self._mode is BodyMode.NONE and self._state in {_State.SENT, _State.WAITING}
        if self._state is not _State.BODY and not placed:
            return ()
        message = "the decode server's connection was cut before its answer had begun, and there is no other attempt"
        return self._refuse(Rejection(502, Reason.DECODE_FAILED, message))

    def let_go(self, headers: Headers = ()) -> _Replies:
        """Let the response go to the client; a failure of a server (5xx) with these headers besides its own."""
        state = self._state
        if state not in {_State.HELD, _State.REFUSING}:
            return ()
        self._state = _State.RESPONDING
        phase = Phase.RESPONSE_HEADERS if state is _State.HELD else Phase.RESPONSE_BODY
        if self.status is not None and self.status >= _FAILED:
            return (Mutate(phase, set_headers=headers, remove_headers=_WORDS_OF_ENVOY),)
        if state is _State.HELD:
            if not self._is_to_be_merged:
                return _GO_ON_RESPONSE
            self._asks_for_body = True
            return _SEE_RESPONSE if self._streams else _TAKE_RESPONSE
        return (Continue(phase),)

    def merge_with(self, prefill: bytes) -> None:
        """Put what the prefill leg's answer tells of the prompt into the response."""
        self._merger = make_merger(prefill, streaming=self._streams)

    def take_body(self) -> _Replies:
        """Ask for the text of a response that is an error, before it goes to the client."""
        if self._state is not _State.HELD:
            return ()
        self._state, self._asks_for_body = _State.REFUSING, True
        return (BufferBody(Phase.RESPONSE_HEADERS),)

    def abandon(self, status: int, body: bytes, reason: Reason, headers: Headers) -> _Replies:
        """Answer the client in the engine's place: with an error of ours, or with what the other leg said."""
        if not self.can_be_abandoned:
            return ()
        self._state = _State.OVER
        self.status = status
        return (answer_instead(status, body, reason, headers),)

    def expire(self) -> _Replies:
        """Give up waiting for the rest of a body that is being held."""
        if self._state is not _State.BODY:
            return ()
        return self._refuse(Rejection(408, Reason.BODY_TIMEOUT, "the request body did not arrive in time"))

    def fail(self, message: str) -> _Replies:
        """Turn an unexpected error into an answer, while there still can be one."""
        if self._state in {_State.RESPONDING, _State.OVER}:
            return ()
        return self._refuse(Rejection(500, Reason.INTERNAL_ERROR, message))

    def _request_headers(self, event: RequestHeaders) -> _Replies:
        headers = event.headers
        self._is_whole = self._is_whole or event.end_of_stream
        asked = read_path(headers.get(":method", ""), headers.get(":path", ""))
        reads = contract.READ_BEHIND_GATEWAY if self._picks else contract.READ_FROM_REQUESTS
        foreign = headers.keys() - reads - {self._session_header}
        self._session = None if self._session_header is None else headers.get(self._session_header)
        if self._picks:
            self._foreign = tuple(name for name in foreign if not name.startswith("x-envoy-"))  # Envoy would keep them
        else:
            self._foreign = tuple(foreign)
            avoided = headers.get(contract.AVOID)
            self.failed, self.cut = contract.read_failed(avoided), contract.read_cut(avoided)
        refusal = refuse_by_headers(headers, self._max_body)
        if self._picks and (not isinstance(asked, Api) or (refusal is not None and refusal.status == _UNSUPPORTED)):
            return self._pass_on()  # the gateway has decided that it is a request for these servers
        if isinstance(asked, Rejection):
            return self._refuse(asked)
        if isinstance(asked, Lookup):
            return self._look_up(asked, headers[":path"])
        if refusal is not None:
            return self._refuse(refusal)
        if event.end_of_stream:
            return self._refuse(NO_BODY)
        if self._mode is BodyMode.UNSUPPORTED:
            message = "the ext_proc filter must send request bodies BUFFERED or FULL_DUPLEX_STREAMED"
            return self._refuse(Rejection(500, Reason.UNSUPPORTED_BODY_MODE, message))
        self._api = asked
        if self._mode is BodyMode.NONE:
            length = headers.get("content-length", "")
            self._length = int(length) if length.isdecimal() else None
            return self._decide()
        self._state = _State.BODY
        if self._mode is BodyMode.DUPLEX:
            return ()
        return (Mutate(Phase.REQUEST_HEADERS, remove_headers=self._foreign),) if self._foreign else _GO_ON_HEADERS

    def _look_up(self, lookup: Lookup, path: str) -> _Replies:
        if lookup is Lookup.MODELS:
            answer = self._decider.models(path)
            if isinstance(answer, Rejection):
                return self._refuse(answer)
            self._state, self.status = _State.OVER, 200
            return (tell_models(answer.body),)
        return self._pass_on()

    def _pass_on(self) -> _Replies:
        """Send a request that is not read to any server."""
        decision = self._decider.look_up(self._subset)
        if isinstance(decision, Rejection):
            return self._refuse(decision)
        # A body on such a request is unusual and none of our business; in duplex it is passed on as it comes.
        self._state = _State.SENT
        return (self._route(Phase.REQUEST_HEADERS, decision, decision.headers),)

    def _request_body(self, event: RequestBody) -> _Replies:
        self._size += len(event.data)
        if self._size > self._max_body:
            return self._refuse(too_large(self._max_body))
        self._body.append(event.data)
        self._is_whole = event.end_of_stream or self._mode is not BodyMode.DUPLEX
        if self._mode is BodyMode.DUPLEX and not event.end_of_stream:
            return ()
        return self._decide()

    def _request_body_ended_by_trailers(self, _event: RequestTrailers) -> _Replies:
        if self._mode is not BodyMode.DUPLEX:  # a buffered body would have come before them
            return self._refuse(NO_BODY)
        self._trailers = self._is_whole = True
        return self._decide()

    def _decide(self, ticket: Ticket | None = None) -> _Replies:
        assert self._api is not None  # noqa: S101 - the state says so
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        context = RequestContext(self._session, self.failed, ticket, self._subset, self.sees_answer)
        if self._queued is not None:
            decision = self._decider.place_queued(self._queued, context)
        elif self._mode is BodyMode.NONE:
            decision = self._decider.place_unread(self._api, self._length, context)
        else:
            decision = self._decider.place(self._api, body, context)
        if isinstance(decision, Queued):
            self._state, self._queued, self._body = _State.WAITING, decision, [body]
            return ()
        if isinstance(decision, Rejection):
            return self._refuse(decision)
        self._body = []
        self.decision = decision
        self._state = _State.SENT
        if self._mode is BodyMode.DUPLEX:
            # Envoy itself removes the content-length of a streamed body.
            head = self._route(Phase.REQUEST_HEADERS, decision, decision.headers)
            chunks = cut(body if decision.body is None else decision.body, end_of_stream=not self._trailers)
            return (head, *chunks, Continue(Phase.REQUEST_TRAILERS)) if self._trailers else (head, *chunks)
        if decision.body is None:
            phase = Phase.REQUEST_HEADERS if self._mode is BodyMode.NONE else Phase.REQUEST_BODY
            return (self._route(phase, decision, decision.headers),)
        length = ("content-length", b"%d" % len(decision.body))
        return (self._route(Phase.REQUEST_BODY, decision, (*decision.headers, length), decision.body),)

    def _route(self, phase: Phase, decision: Decision, headers: Headers, body: bytes | None = None) -> Mutate:
        foreign = self._foreign if phase is Phase.REQUEST_HEADERS else ()
        return route(phase, decision, headers, body, foreign=foreign, picks=self._picks)

    def _refuse(self, refusal: Rejection) -> _Replies:
        self._state = _State.OVER
        self._body = []
        self.refusal = refusal.reason
        self.status = refusal.status
        return (refuse(refusal),)

    def _late_request_body(self, event: RequestBody) -> _Replies:
        """Pass on the body of a request that needed no body to be placed."""
        self._is_whole = self._is_whole or event.end_of_stream
        if self._mode is BodyMode.DUPLEX:
            return (StreamedChunk(Phase.REQUEST_BODY, event.data, event.end_of_stream),)
        return (Continue(Phase.REQUEST_BODY),)

    def _request_trailers(self, _event: RequestTrailers) -> _Replies:
        self._is_whole = True
        return (Continue(Phase.REQUEST_TRAILERS),)

    def _response_headers(self, event: ResponseHeaders) -> _Replies:
        self.status = event.status
        if self.holds and self.attempt is not None:
            self._state = _State.HELD
            return ()
        self._state = _State.RESPONDING
        return _GO_ON_RESPONSE

    def _response_text(self, _event: ResponseBody) -> _Replies:
        return ()  # who asked for it goes on with let_go()

    def _response_body(self, event: ResponseBody) -> _Replies:
        if self._response_mode is BodyMode.DUPLEX:
            return (StreamedChunk(Phase.RESPONSE_BODY, event.data, event.end_of_stream),)
        if self._merger is not None:
            merged = self._merger.feed(event.data, end_of_stream=event.end_of_stream)
            # A whole answer is here at once, so its length is known, and its head has not gone yet.
            length = () if self._streams else (("content-length", b"%d" % len(merged)),)
            return (Mutate(Phase.RESPONSE_BODY, body=merged, set_headers=length),)
        return (Continue(Phase.RESPONSE_BODY),)

    @property
    def merges(self) -> bool:
        """Whether a good answer is to be completed with what prefill tells."""
        return self.decision is not None and self.decision.merges_logprobs and self.sees_answer

    @property
    def _streams(self) -> bool:
        return self.decision is not None and self.decision.streaming is True

    @property
    def _is_to_be_merged(self) -> bool:
        return self.merges and self.status == _OK

    def _response_trailers(self, _event: ResponseTrailers) -> _Replies:
        return (Continue(Phase.RESPONSE_TRAILERS),)

    _TRANSITIONS: ClassVar[dict[tuple[_State, type], Any]] = {
        (_State.START, RequestHeaders): _request_headers,
        (_State.START, ResponseHeaders): _response_headers,
        (_State.BODY, RequestBody): _request_body,
        (_State.BODY, RequestTrailers): _request_body_ended_by_trailers,
        (_State.BODY, ResponseHeaders): _response_headers,  # Envoy answered while the body was coming: 408, 413
        (_State.SENT, RequestBody): _late_request_body,
        (_State.SENT, RequestTrailers): _request_trailers,
        (_State.SENT, ResponseHeaders): _response_headers,
        (_State.WAITING, ResponseHeaders): _response_headers,
        (_State.HELD, RequestBody): _late_request_body,
        (_State.HELD, RequestTrailers): _request_trailers,
        (_State.REFUSING, ResponseBody): _response_text,
        (_State.RESPONDING, RequestBody): _late_request_body,
        (_State.RESPONDING, RequestTrailers): _request_trailers,
        (_State.RESPONDING, ResponseBody): _response_body,
        (_State.RESPONDING, ResponseTrailers): _response_trailers,
    }
    """Every event that is allowed in a state, and what handles it; all others are violations of the protocol."""


_FAILED: Final = 500
_WORDS_OF_ENVOY: Final = (contract.RETRY, contract.FAILED)
"""What Envoy adds to an error of its own, so that it repeats the request if nobody here is left to decide that."""
_UNSUPPORTED: Final = 415
"""Of bodies that cannot be read."""
_GO_ON_HEADERS: Final[_Replies] = (Continue(Phase.REQUEST_HEADERS),)
_GO_ON_RESPONSE: Final[_Replies] = (Continue(Phase.RESPONSE_HEADERS),)
_SEE_RESPONSE: Final[_Replies] = (StreamBody(Phase.RESPONSE_HEADERS),)
_TAKE_RESPONSE: Final[_Replies] = (BufferBody(Phase.RESPONSE_HEADERS),)
"""Envoy keeps a whole answer until it has been changed. Should the service end meanwhile, it goes on as it was."""
