"""Replies on the main stream, in each body mode.

1. In lock-step each message gets one reply of its own phase. Routing headers go with the reply to the body, as the
   reply to the headers is due before the body comes.
2. Where bodies are not sent here, the reply to the headers routes.
3. In duplex no reply goes out until the whole body is in; then headers, chunks and trailers follow in this order.
   Routing headers go with the reply to the headers, as Envoy ignores those of a body reply.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from dp_extproc import contract
from dp_extproc.attempt import events as on
from dp_extproc.attempt.events import BodyMode, Continue, Immediate, Mutate, Phase, Reply, StreamedChunk
from dp_extproc.attempt.failures import Failure
from dp_extproc.attempt.gateways import Gateway, Headers
from dp_extproc.attempt.intake import Intake
from dp_extproc.request.error_shapes import ErrorShape
from dp_extproc.request.rejection import Rejection
from dp_extproc.scheduling.decision import Answer, Decision

CHUNK_BYTES: Final = 62_000
"""Bytes of the largest chunk of a duplex body. The protocol recommends at most 64 KiB; this leaves room for framing."""

CONTINUE: Final = {phase: Continue(phase) for phase in Phase}
_PHASES: Final[dict[type, Phase]] = {
    on.RequestBody: Phase.REQUEST_BODY,
    on.RequestTrailers: Phase.REQUEST_TRAILERS,
    on.ResponseBody: Phase.RESPONSE_BODY,
    on.ResponseTrailers: Phase.RESPONSE_TRAILERS,
}
_JSON: Final = ("content-type", "application/json")
SKIPPED: Final = frozenset({BodyMode.LOCKSTEP, BodyMode.UNSUPPORTED})
"""Modes of response bodies that a gateway may give up for this response, where it allows that."""
RETRY_BY_CLIENT: Final = (("retry-after", b"0"),)
"""Where the gateway repeats no request: the client may, because nothing was generated."""
RETRY_HEADERS: Final = (contract.RETRY, contract.FAILED)
"""Retry headers that Envoy's local reply sets itself. Removed here, because the service decides about the retry."""


def await_body(mode: BodyMode, untrusted: tuple[str, ...]) -> tuple[Reply, ...]:
    """Reply to the headers of a request whose body decides."""
    if mode is BodyMode.DUPLEX:
        return ()
    if untrusted:
        return (Mutate(Phase.REQUEST_HEADERS, remove_headers=untrusted),)
    return (CONTINUE[Phase.REQUEST_HEADERS],)


def route(
    phase: Phase,
    decision: Decision,
    gateway: Gateway,
    *,
    headers: Headers | None = None,
    body: bytes | None = None,
    untrusted: Iterable[str] = (),
) -> Mutate:
    """Route a request by a decision, with its headers or others, and without the untrusted headers."""
    headers = decision.headers if headers is None else headers
    headers, destination = gateway.destination(headers, decision.fallbacks)
    kept = {name for name, _ in headers} if untrusted else ()
    return Mutate(
        phase,
        set_headers=headers,
        remove_headers=tuple(name for name in untrusted if name not in kept),
        body=body,
        clear_route_cache=True,  # the routes match on the headers that are set here
        metadata=decision.metadata,
        destination=destination,
    )


def route_body(intake: Intake, decision: Decision, gateway: Gateway) -> Iterator[Reply]:
    """Route an inference request by a decision, in the body mode of its stream."""
    mode, body, headers = intake.mode, intake.take_body(), (*decision.headers, *intake.corrected)
    if mode is BodyMode.LOCKSTEP:
        new = decision.body
        length = () if new is None else (("content-length", b"%d" % len(new)),)
        yield route(Phase.REQUEST_BODY, decision, gateway, headers=(*headers, *length), body=new)
        return
    yield route(Phase.REQUEST_HEADERS, decision, gateway, headers=headers, untrusted=intake.untrusted)
    if mode is BodyMode.DUPLEX:  # Envoy itself removes the content-length of a streamed body
        yield from cut(body if decision.body is None else decision.body, end_of_stream=not intake.has_trailers)
        if intake.has_trailers:
            yield CONTINUE[Phase.REQUEST_TRAILERS]


def cut(body: bytes, *, end_of_stream: bool) -> Iterator[StreamedChunk]:
    """Cut a body into chunks; an empty one is one empty chunk. Only the last chunk may end the stream."""
    view = memoryview(body)
    last = max(0, (len(body) - 1) // CHUNK_BYTES)
    for index in range(last + 1):
        piece = bytes(view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES])
        yield StreamedChunk(Phase.REQUEST_BODY, piece, end_of_stream and index == last)


def pass_on(
    mode: BodyMode, event: on.RequestBody | on.RequestTrailers | on.ResponseBody | on.ResponseTrailers
) -> Reply:
    """Pass on a piece of a request that is on its way already, or of a response."""
    phase = _PHASES[type(event)]
    if mode is BodyMode.DUPLEX and isinstance(event, (on.RequestBody, on.ResponseBody)):
        return StreamedChunk(phase, event.data, event.end_of_stream)
    return CONTINUE[phase]


def refuse(rejection: Rejection, shape: ErrorShape) -> Immediate:
    reason = rejection.reason.value
    headers = (_JSON, (contract.REASON_HEADER, reason), *rejection.response_headers())
    return Immediate(rejection.status, rejection.body(shape), headers, reason, {contract.META_REASON: reason})


def answer(found: Answer) -> Immediate:
    """Answer a request that reaches no engine, such as one for the list of models."""
    media = (_JSON,) if found.body else ()
    headers = (*media, *found.headers)
    return Immediate(found.status, found.body, headers, "answered", {contract.META_REASON: "answered"})


ABORTS_SENT: Final = answer(Answer(b""))
"""The answer of SGLang to an ``/abort_request``, for any id."""


def answer_failure(failure: Failure, shape: ErrorShape, retry_headers: Headers) -> Immediate:
    """Answer the client in place of the engine."""
    reason = failure.reason.value
    texts = tuple((name, value.decode("latin-1")) for name, value in retry_headers)
    own = () if failure.is_clients_fault else ((contract.REASON_HEADER, reason),)
    return Immediate(failure.status, failure.body(shape), (_JSON, *own, *texts), reason, {contract.META_REASON: reason})
