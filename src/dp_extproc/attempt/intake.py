"""The request of an attempt: its headers and its body, until there is something to decide.

1. What the headers alone rule out is refused without its body.
2. Where bodies are not sent here, the headers decide.
3. A body in duplex is collected whole before anything is decided.
"""

from enum import Enum, auto
from typing import Final, Protocol

from dp_extproc import contract
from dp_extproc.attempt.events import AbortRequests, BodyMode, RequestBody, RequestHeaders
from dp_extproc.attempt.gateways import FIRST_ATTEMPT, Gateway, Headers
from dp_extproc.request.client_ids import client_key, read_abort
from dp_extproc.request.error_shapes import ErrorShape, shape_of
from dp_extproc.request.path import Abort, Asked, Models, Moved, Passed, read_path
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import Api
from dp_extproc.scheduling.admission import Ticket
from dp_extproc.scheduling.decision import Answer, Decision, Queued, RequestContext, SchedulingResult

_MAX_LENGTH_DIGITS: Final = 20
"""Digits of a content-length that is read: as many as a number of 64 bits has. Python refuses thousands of them."""
_UNSUPPORTED: Final = 415
"""Status of bodies that cannot be read."""

_AS_JSON: Final = (("content-type", b"application/json"),)
_NO_BODY: Final = Rejection(400, Reason.EMPTY_BODY, "the request has no body; send a JSON object")
_UNSUPPORTED_MODE: Final = Rejection(
    500, Reason.UNSUPPORTED_BODY_MODE, "the ext_proc filter must send request bodies BUFFERED or FULL_DUPLEX_STREAMED"
)
_BODIES_NEEDED: Final = Rejection(
    400,
    Reason.UNSUPPORTED_BODY_MODE,
    "request ids are not read with body_mode none; close the connection to end a request",
)


class Decider(Protocol):
    """The interface of scheduling that an attempt uses."""

    def place(self, api: Api, body: bytes, context: RequestContext) -> SchedulingResult:
        """Schedule an inference request."""
        ...

    def place_unread(self, api: Api, length: int | None, context: RequestContext) -> SchedulingResult:
        """Schedule an inference request whose body does not pass through the service."""
        ...

    def place_queued(self, queued: Queued, context: RequestContext) -> SchedulingResult:
        """Schedule a request again that had to wait."""
        ...

    def look_up(self, subset: frozenset[str] | None = None) -> Decision | Rejection:
        """Pick an endpoint for a request that any engine can answer."""
        ...

    def pass_on(self, passed: Passed, body: bytes | None, context: RequestContext) -> Decision | Rejection | None:
        """Pick an endpoint for a request that is passed as it is; None if its body has to be read before."""
        ...

    def models(self, path: str) -> Answer | Rejection:
        """Answer a request for the list of models."""
        ...

    def lost(self, address: str) -> None:
        """Count a failure of the endpoint at this address, which has dropped a request."""
        ...

    def suspect(self, url: str) -> None:
        """Have the facts of an endpoint read soon, because a leg has failed there."""
        ...

    def contradicted(self, url: str, why: str) -> None:
        """Have the facts of an endpoint read before it gets another request, if there are others."""
        ...

    def engine_lost(self, fingerprint: str, address: str) -> None:
        """Note that the engine at this address has dropped a request after it had accepted it."""
        ...


class Need(Enum):
    """What an inference request needs next."""

    BODY = auto()
    SCHEDULING = auto()


class Intake:
    """Collects one request."""

    __slots__ = (
        "_aborts", "_api", "_authorization", "_body", "_decider", "_gateway", "_length", "_max_body", "_passed",
        "_session", "_size", "_subset", "client_keys", "corrected", "earlier", "errors", "has_trailers", "is_complete",
        "mode", "passed", "path", "queued", "sees_response", "untrusted",
    )  # fmt: skip

    def __init__(
        self, decider: Decider, gateway: Gateway, mode: BodyMode, max_body: int, subset: frozenset[str] | None
    ) -> None:
        """Set up; *max_body* is the size in bytes above which a body is refused with 413."""
        self._decider = decider
        self._gateway = gateway
        self._max_body = max_body
        self._subset = subset
        self._api = Api.GENERATE
        self._aborts = False
        """Whether this is an ``/abort_request``."""
        self._authorization = ""
        self._passed: Passed | None = None
        """What is passed as it is, once its body is read; None for an inference request."""
        self._session: str | None = None
        self._length: int | None = None
        self._body: list[bytes] = []
        self._size = 0
        self.mode = mode
        self.sees_response = gateway.sends_bodies_on_request and mode is not BodyMode.DUPLEX
        """Whether Envoy sends the response body when asked for it; in duplex it ignores that."""
        self.path = ""
        """Path and query."""
        self.errors = ErrorShape.OPENAI
        """The shape in which the client reads errors."""
        self.passed: Headers = ()
        """The headers that a prefill leg of the service has, too."""
        self.client_keys: dict[str, tuple[int, ...]] = {}
        """The prompts of each key under which the client may end this request."""
        self.corrected: Headers = ()
        """Headers of the client in the form that engines accept."""
        self.untrusted: tuple[str, ...] = ()
        self.earlier = FIRST_ATTEMPT
        self.has_trailers = False
        self.is_complete = mode is BodyMode.NONE
        """Whether no more of the request comes here."""
        self.queued: Queued | None = None
        """What waits in the admission queue; None if nothing does."""

    def read_headers(self, event: RequestHeaders) -> Need | Decision | Answer | Rejection:
        """Give what an inference request needs next; the answer to every other request."""
        headers, gateway = event.headers, self._gateway
        self.is_complete = self.is_complete or event.end_of_stream
        self.errors = shape_of(headers.get(":path", ""))
        self.untrusted = gateway.untrusted(headers)
        self._authorization = headers.get(contract.AUTHORIZATION, "")
        self.earlier = gateway.earlier(headers)
        if gateway.session_header is not None:
            self._session = headers.get(gateway.session_header)
        asked = read_path(headers.get(":method", ""), headers.get(":path", ""))
        if not isinstance(asked, Api):
            return self._read_other(asked, event)
        if (refusal := _refuse_by_headers(headers, self._max_body)) is not None:
            passes = gateway.passes_other_paths and refusal.status == _UNSUPPORTED
            return self._decider.look_up(self._subset) if passes else refusal
        if "," in headers.get("content-type", ""):
            self.corrected = _AS_JSON
        if event.end_of_stream:
            return _NO_BODY
        if self.mode is BodyMode.UNSUPPORTED:
            return _UNSUPPORTED_MODE
        self._api = asked
        path = _printable(headers[":path"])
        self.path = asked.value if " " in path else path or asked.value
        self.passed = tuple(
            (name, value.encode())
            for name in contract.PASSED_TO_PREFILL
            if (value := _printable(headers.get(name, "")))
        )
        if self.mode is not BodyMode.NONE:
            return Need.BODY
        length = headers.get("content-length", "")
        self._length = int(length) if length.isdecimal() else None
        return Need.SCHEDULING

    def _read_other(self, asked: Asked, event: RequestHeaders) -> Need | Decision | Answer | Rejection:
        """Read a request that is no inference request."""
        if isinstance(asked, Rejection) and asked.reason is Reason.PATH_REFUSED:
            return asked
        if isinstance(asked, Abort):
            return self._read_abort(event)
        if isinstance(asked, Passed) and not (asked.is_head and not self._gateway.passes_other_paths):
            return self._pass_on(asked, event)
        # A gateway of this kind has decided already that the request is for these endpoints.
        if self._gateway.passes_other_paths:
            return self._decider.look_up(self._subset)
        if isinstance(asked, Models):
            return self._decider.models(asked.path)
        if isinstance(asked, Moved):
            return Answer(b"", 307, (("location", asked.location),))
        if isinstance(asked, Passed):
            found = self._pass_on(asked, event)
            return Answer(b"") if isinstance(found, Decision) else found
        assert isinstance(asked, Rejection)  # noqa: S101 - an inference request is read elsewhere
        return asked

    def _read_abort(self, event: RequestHeaders) -> Need | Rejection:
        if (refusal := _refuse_by_headers(event.headers, self._max_body)) is not None:
            return refusal
        if event.end_of_stream:
            return _NO_BODY
        if self.mode in {BodyMode.NONE, BodyMode.UNSUPPORTED}:
            return _BODIES_NEEDED
        self._aborts = True
        return Need.BODY

    def _pass_on(self, passed: Passed, event: RequestHeaders) -> Need | Decision | Rejection:
        """Pass a request on as it is, at once or with its body."""
        found = self._decider.pass_on(passed, b"" if event.end_of_stream else None, self._context())
        if found is not None and not isinstance(found, Decision):
            return found
        if (refusal := _refuse_size(event.headers, self._max_body)) is not None:
            return refusal
        if found is not None:
            return found
        if (refusal := _refuse_encoding(event.headers)) is not None:
            return refusal
        if self.mode in {BodyMode.NONE, BodyMode.UNSUPPORTED}:
            return _UNSUPPORTED_MODE
        self._passed = passed
        return Need.BODY

    def _context(self, ticket: Ticket | None = None) -> RequestContext:
        earlier = self.earlier
        return RequestContext(self._session, earlier.failed, ticket, self._subset, self.sees_response, earlier.losses)

    def read_body(self, event: RequestBody) -> Need | Rejection:
        """Read the body, or a chunk of it."""
        self._size += len(event.data)
        if self._size > self._max_body:
            self._body.clear()
            return _too_large(self._max_body)
        self._body.append(event.data)
        self.is_complete = event.end_of_stream or self.mode is not BodyMode.DUPLEX
        return Need.SCHEDULING if self.is_complete else Need.BODY

    def read_trailers(self) -> Need | Rejection:
        """End the body by trailers."""
        if self.mode is not BodyMode.DUPLEX:  # a buffered body would have come before them
            return _NO_BODY
        self.has_trailers = self.is_complete = True
        return Need.SCHEDULING

    def schedule(self, ticket: Ticket | None) -> SchedulingResult | AbortRequests:
        """Schedule the complete request, which may have a place in the admission queue, or read what it ends."""
        if self._aborts:
            client_id = read_abort(b"".join(self._body))
            return client_id if isinstance(client_id, Rejection) else AbortRequests(self._key(client_id))
        context = self._context(ticket)
        result: SchedulingResult
        if self.queued is not None:
            result = self._decider.place_queued(self.queued, context)
        elif self.mode is BodyMode.NONE:
            result = self._decider.place_unread(self._api, self._length, context)
        else:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body = [body]
            if self._passed is None:
                result = self._decider.place(self._api, body, context)
            else:
                found = self._decider.pass_on(self._passed, body, context)
                assert found is not None  # noqa: S101 - its body is read
                result = found
        self.queued = result if isinstance(result, Queued) else None
        if isinstance(result, Rejection):
            self._body.clear()
        elif (client_ids := result.client_ids) is not None and not self.client_keys:
            self.client_keys = {self._key(each): prompts for each, prompts in client_ids.prompts().items()}
        return result

    @property
    def prompts(self) -> int:
        """The number of prompts in the queued request."""
        return 1 if self.queued is None else self.queued.request.prompt.batch or 1

    def _key(self, client_id: str) -> str:
        return client_key(self._authorization, client_id)

    def take_body(self) -> bytes:
        """Give the client's body away, so that it is not kept for as long as the response takes."""
        body, self._body = self._body, []
        return body[0] if body else b""


def _printable(value: str) -> str:
    """Return a value that can stand in the head of an HTTP request; empty if it cannot."""
    return value if value.isascii() and value.isprintable() else ""


def _refuse_by_headers(headers: dict[str, str], max_body: int) -> Rejection | None:
    """Refuse a body that cannot be read or is too large, by what its headers announce."""
    if (refusal := _refuse_encoding(headers)) is not None:
        return refusal
    media = headers.get("content-type", "application/json")
    if media != "application/json" and not _is_json(media):
        message = f"content-type must be application/json, not {media[:100]!r}"
        return Rejection(_UNSUPPORTED, Reason.NOT_JSON, message)
    return _refuse_size(headers, max_body)


def _refuse_encoding(headers: dict[str, str]) -> Rejection | None:
    encoding = headers.get("content-encoding")
    if encoding is None or encoding.strip().lower() in {"", "identity"}:
        return None
    message = f"request bodies with content-encoding {encoding!r} cannot be read; send the JSON uncompressed"
    return Rejection(_UNSUPPORTED, Reason.COMPRESSED_BODY, message)


def _refuse_size(headers: dict[str, str], max_body: int) -> Rejection | None:
    length = headers.get("content-length", "")
    if length.isdecimal() and (len(length) > _MAX_LENGTH_DIGITS or int(length) > max_body):
        return _too_large(max_body)
    return None


def _is_json(content_type: str) -> bool:
    """Check each value; a client that sets the header twice may send "application/json, application/json"."""
    values = (value.partition(";")[0].strip().lower() for value in content_type.split(","))
    return all(media == "application/json" or media.endswith("+json") for media in values)


def _too_large(max_body: int) -> Rejection:
    return Rejection(
        413, Reason.BODY_TOO_LARGE, f"the request body is larger than {max_body} bytes; send a smaller one"
    )
