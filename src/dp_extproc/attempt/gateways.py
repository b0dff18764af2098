"""The two kinds of gateways: whose headers are trusted, and what a gateway lets the service do."""

import math
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from dp_extproc import contract
from dp_extproc.attempt.events import BodyMode

Headers = tuple[tuple[str, bytes], ...]


class EarlierAttempts(Struct, frozen=True):
    """The earlier attempts of a request, as the gateway reports them."""

    failed: tuple[frozenset[str], ...] = ()
    """Addresses of the endpoints of each attempt, the last one's at the end."""
    lost: str | None = None
    """Address of the endpoint that dropped the last attempt, if that failure was not counted yet."""
    losses: tuple[str, ...] = ()
    """Addresses of the endpoints that have dropped an attempt after they had accepted it."""
    error: contract.EngineError | None = None
    """The engine's error that the last attempt has failed by, if that failure was not counted yet."""


FIRST_ATTEMPT: Final = EarlierAttempts()


class Peer:
    """One instance of a gateway, and what it has shown of its own settings so far."""

    __slots__ = ("sends_responses",)

    def __init__(self, *, sends_responses: bool) -> None:
        self.sends_responses = sends_responses
        """Whether the gateway has sent response headers here. If not, a stream may end though the request goes on."""


BUNDLED: Final = Peer(sends_responses=True)
"""Any Envoy with the printed configuration."""


class BundledEnvoy:
    """The Envoy that ``envoy-config`` prints. It removes from clients' requests every header that it sets itself."""

    repeats_requests = True
    """Whether the gateway schedules a request again if a response has the retry headers."""
    sends_bodies_on_request = True
    """Whether the gateway sends response bodies here when asked for them, and waits longer when asked to."""
    opens_leg_streams = True
    """Whether mirrored prefill legs and first events have streams of their own, named in the initial metadata."""
    may_skip_responses = False
    """Whether the gateway may be configured to send no response headers here."""
    names_subsets = False
    """Whether the metadata of a request may name the endpoints that it can go to."""
    passes_other_paths = False
    """Whether requests that the service does not read go to any endpoint."""
    session_header: str | None = contract.SESSION
    """The header that names the conversation; None for none."""

    def untrusted(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        """Name the headers that a client must not have set, so that they are removed."""
        return tuple(headers.keys() - _READ_FROM_BUNDLED)

    def earlier(self, headers: Mapping[str, str]) -> EarlierAttempts:
        """Read the earlier attempts of a request."""
        avoided = headers.get(contract.AVOID)
        if not avoided:
            return FIRST_ATTEMPT
        return EarlierAttempts(
            contract.read_failed(avoided),
            contract.read_cut(avoided),
            contract.read_lost(avoided),
            contract.read_error(avoided),
        )

    def longest_hold(self, response_mode: BodyMode) -> float:  # noqa: ARG002 - the same in every mode
        """Return the seconds for which response headers may be held in a mode of response bodies."""
        return math.inf

    def shows_first_events(self, response_mode: BodyMode) -> bool:  # noqa: ARG002 - they have a stream of their own
        """Return whether first events are seen before their response goes to the client."""
        return True

    def destination(self, headers: Headers, fallbacks: tuple[str, ...]) -> tuple[Headers, str | None]:  # noqa: ARG002
        """Write where a request goes: headers, and the addresses for the metadata of the load balancing.

        *fallbacks* are the addresses of further endpoints, for a gateway that cannot connect to the first one.
        """
        return headers, None


class EndpointPicker:
    """A gateway that speaks the endpoint-picker protocol: it routes, and the service only names the endpoint.

    No header is trusted, for nothing has removed what clients have set. The gateway repeats no request here, so a
    request has one attempt.
    """

    repeats_requests = False
    sends_bodies_on_request = False
    opens_leg_streams = False
    may_skip_responses = True
    names_subsets = True
    passes_other_paths = True

    def __init__(self, session_header: str | None = None, *, hold: float = 0.0) -> None:
        """Set up.

        Args:
            session_header: The header of clients, which nothing has copied to ``x-dp-session``.
            hold: Seconds for which response headers may be held while the gateway's timer for messages runs.
        """
        self.session_header = session_header
        self._read = contract.READ_BEHIND_GATEWAY | {session_header}
        self._hold = hold

    def untrusted(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        # Envoy would not let x-envoy- headers be removed.
        return tuple(name for name in headers.keys() - self._read if not name.startswith("x-envoy-"))

    def earlier(self, headers: Mapping[str, str]) -> EarlierAttempts:  # noqa: ARG002 - no header is trusted
        return FIRST_ATTEMPT

    def longest_hold(self, response_mode: BodyMode) -> float:
        # Envoy runs no timer for messages where bodies are in full duplex.
        return math.inf if response_mode is BodyMode.DUPLEX else self._hold

    def shows_first_events(self, response_mode: BodyMode) -> bool:
        return response_mode is BodyMode.DUPLEX

    def destination(self, headers: Headers, fallbacks: tuple[str, ...]) -> tuple[Headers, str | None]:
        address = ",".join((dict(headers)[contract.DECODE_HOST].decode(), *fallbacks))
        others = (each for each in headers if each[0] != contract.DECODE_HOST)
        return ((contract.DESTINATION, address.encode()), *others), address


Gateway = BundledEnvoy | EndpointPicker

_READ_FROM_BUNDLED: Final = contract.READ_FROM_REQUESTS.union(contract.PASSED_TO_PREFILL)
"""Headers that the bundled Envoy forwards, and that stay on the request."""
