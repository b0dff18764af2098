"""What comes of scheduling a request: a decision, a rejection, or a place to wait."""

from msgspec import Struct

from dp_extproc.load.in_flight import InFlight
from dp_extproc.prefix_cache.blocks import Prefix
from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.rejection import Rejection
from dp_extproc.scheduling.admission import Ticket

Metadata = dict[str, str | int]
"""Dynamic metadata of a request, by the names of :mod:`dp_extproc.contract`."""


class RequestContext(Struct, frozen=True):
    """The facts of a request besides its body."""

    session: str | None = None
    """The client's name for the conversation."""
    failed: tuple[frozenset[str], ...] = ()
    """The hosts of each attempt of this request that has failed, in order."""
    ticket: Ticket | None = None
    """Its place in the admission queue; None if it has none."""
    subset: frozenset[str] | None = None
    """The endpoints among which a gateway allows to choose; None for all."""
    sees_answer: bool = True
    """Whether the body of the answer can be seen and changed."""


class Decision(Struct, frozen=True):
    """Let the request through, to these hosts."""

    body: bytes | None
    """The new body; None leaves the request as it is."""
    headers: tuple[tuple[str, bytes], ...]
    """To set on the request."""
    metadata: Metadata
    """For access logs."""
    in_flight: InFlight | None
    """The reservations of the request; None for one that has none."""
    streaming: bool | None = False
    """Whether the client wants a stream of events; None where only the answer will tell."""
    merges_logprobs: bool = False
    """Whether the client wants log probabilities, of which the prefill leg's answer has a part."""


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


SchedulingResult = Decision | Rejection | Queued


class Answer(Struct, frozen=True):
    """Answer the client without asking an engine."""

    body: bytes
