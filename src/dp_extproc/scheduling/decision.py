"""The records that scheduling takes and returns: the context of a request, and its decision, or that it has to wait."""

from collections.abc import Iterable

from msgspec import Struct
from msgspec.structs import replace

from dp_extproc.load.in_flight import InFlight
from dp_extproc.load.records import NO_WORK, Work
from dp_extproc.prefix_cache.blocks import Prefix
from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.client_ids import ClientIds
from dp_extproc.request.prompt_parts import PromptPart
from dp_extproc.request.rejection import Rejection
from dp_extproc.response.renaming import Renames
from dp_extproc.scheduling.admission import Ticket

Headers = tuple[tuple[str, bytes], ...]

Metadata = dict[str, str | int]
"""Dynamic metadata of a request, under the keys of :mod:`dp_extproc.contract`."""


class RequestContext(Struct, frozen=True):
    """The facts of a request besides its body."""

    session: str | None = None
    """The id of the conversation, as the client sent it."""
    failed: tuple[frozenset[str], ...] = ()
    """The addresses of the endpoints of each failed attempt of the request, in order."""
    ticket: Ticket | None = None
    """Its place in the admission queue; None if it has none."""
    subset: frozenset[str] | None = None
    """The endpoints that the gateway allows; None for all."""
    sees_answer: bool = True
    """Whether the body of the response passes through the service, and can be changed."""
    lost: tuple[str, ...] = ()
    """The addresses of the engines that have dropped the request after they had accepted it."""
    occupied: frozenset[str] = frozenset()
    """The addresses that it is to avoid if there are others; see :meth:`.deadly.DeadlyRequests.occupied`."""

    @property
    def avoided(self) -> tuple[frozenset[str], ...]:
        """What is to be avoided, in an order as that of :attr:`failed`."""
        return (self.occupied, *self.failed) if self.occupied else self.failed


class PrefillRequest(Struct, frozen=True):
    """The prefill leg of a request, where the service sends it itself."""

    pool: str
    address: str
    """``IP:port`` of the prefill endpoint."""
    preamble: bytes
    """The leg preamble of the body."""
    tail: memoryview
    """The rest of the body, which is a part of the decode leg's body."""
    headers: Headers
    """The credentials of the pool."""


class LegAbort(Struct, frozen=True):
    """What ends a leg of a request at its engines."""

    pool: str
    addresses: tuple[str, ...]
    """``IP:port`` of each endpoint that may have the leg."""
    request_ids: tuple[str, ...]
    """The ids of the leg: one, or one for each prompt of a batch."""
    headers: Headers
    """The credentials of the pool."""
    precedes_close: bool = False
    """Whether the engines have to get it before the stream of the leg is closed."""

    def of(self, prompts: Iterable[int]) -> "LegAbort":
        """Return what ends some prompts of a batch alone."""
        return replace(self, request_ids=tuple(self.request_ids[index] for index in prompts))

    def passing(self, headers: Headers) -> "LegAbort":
        """Return it with headers of the client, but for those that it has itself."""
        own = {name for name, _ in self.headers}
        return replace(self, headers=(*(each for each in headers if each[0] not in own), *self.headers))


class Decision(Struct, frozen=True):
    """A request that was scheduled, as Envoy has to send it."""

    body: bytes | None
    """The new body; None leaves the body of the client."""
    headers: Headers
    """Headers to set on the request."""
    metadata: Metadata
    """Dynamic metadata for access logs."""
    in_flight: InFlight | None
    """The reservations of the request; None for one that has none."""
    streaming: bool | None = False
    """Whether the client asked for a stream of events; None if the body was not read."""
    merges: PromptPart | None = None
    """What the client asked for that only the response of the prefill leg has; None for nothing."""
    renames: Renames | None = None
    """The ids to be changed in the response; None for none."""
    prefill: PrefillRequest | None = None
    """The prefill leg that the service has to send; None if there is none, or if Envoy mirrors it."""
    abort: LegAbort | None = None
    """What ends the decode leg; None if Envoy can end it, and its engine notices that."""
    client_ids: ClientIds | None = None
    """The ids that the client has given, by which it may end the request; None for none."""
    legs: tuple[LegAbort, ...] = ()
    """What ends each leg, if the client has given ids."""
    fallbacks: tuple[str, ...] = ()
    """``IP:port`` of further decode endpoints, which can serve the same body."""
    fingerprint: str = ""
    """That of the request; see :mod:`dp_extproc.request.fingerprint`."""


class Queued(Struct, frozen=True):
    """No rank has room for the request now, so it has to wait in the admission queue.

    It carries what was read of the request, so that a later try of scheduling does not parse the body again.
    """

    pool: str
    priority: int
    """Requests of greater priority leave the queue first."""
    request: InferenceRequest
    """The parsed body."""
    prefix: Prefix | None
    """The prefix blocks of the prompt; None if they were not computed yet."""
    rejection: Rejection
    """The answer to the client if the request finds no place in the queue, or waits too long."""
    work: Work = NO_WORK
    """What the request will cost, as estimated without a prefix cache."""

    @property
    def client_ids(self) -> ClientIds | None:
        """The ids that the client has given; None for none."""
        return self.request.client_ids


SchedulingResult = Decision | Rejection | Queued


class Answer(Struct, frozen=True):
    """A response of the service itself."""

    body: bytes
    """JSON, or nothing."""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    """Further response headers."""
