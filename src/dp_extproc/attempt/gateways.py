"""The two kinds of gateways: whose headers are trusted, and what a gateway lets the service do."""

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from dp_extproc import contract

Headers = tuple[tuple[str, bytes], ...]


class EarlierAttempts(Struct, frozen=True):
    """The earlier attempts of a request, as the gateway reports them."""

    failed: tuple[frozenset[str], ...] = ()
    """Addresses of the endpoints of each attempt, the last one's at the end."""
    lost: str | None = None
    """Address of the endpoint that dropped the last attempt, if that failure was not counted yet."""


FIRST_ATTEMPT: Final = EarlierAttempts()


class BundledEnvoy:
    """The Envoy that ``envoy-config`` prints. It removes from clients' requests every header that it sets itself."""

    holds_responses = True
    """Whether a response may be held, replaced by an error, and retried."""
    opens_leg_streams = True
    """Whether prefill legs and first events have streams of their own, named in the initial metadata."""
    names_subsets = False
    """Whether the metadata of a request may name the endpoints that it can go to."""
    passes_other_paths = False
    """Whether requests that the service does not read go to any endpoint."""
    session_header: str | None = contract.SESSION
    """The header that names the conversation; None for none."""

    def untrusted(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        """Name the headers that a client must not have set, so that they are removed."""
        return tuple(headers.keys() - contract.READ_FROM_REQUESTS)

    def earlier(self, headers: Mapping[str, str]) -> EarlierAttempts:
        """Read the earlier attempts of a request."""
        avoided = headers.get(contract.AVOID)
        return EarlierAttempts(contract.read_failed(avoided), contract.read_cut(avoided)) if avoided else FIRST_ATTEMPT

    def destination(self, headers: Headers) -> tuple[Headers, str | None]:
        """Write where a request goes: headers, and the ``IP:port`` for the metadata of the load balancing."""
        return headers, None


class EndpointPicker:
    """A gateway that speaks the endpoint-picker protocol: it routes, and the service only names the endpoint.

    No header is trusted, for nothing has removed what clients have set. Nothing is retried or held here.
    """

    holds_responses = False
    opens_leg_streams = False
    names_subsets = True
    passes_other_paths = True

    def __init__(self, session_header: str | None = None) -> None:
        """Set up; *session_header* is the header of clients, which nothing has copied to ``x-dp-session``."""
        self.session_header = session_header
        self._read = contract.READ_BEHIND_GATEWAY | {session_header}

    def untrusted(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        # Envoy would not let x-envoy- headers be removed.
        return tuple(name for name in headers.keys() - self._read if not name.startswith("x-envoy-"))

    def earlier(self, headers: Mapping[str, str]) -> EarlierAttempts:  # noqa: ARG002 - no header is trusted
        return FIRST_ATTEMPT

    def destination(self, headers: Headers) -> tuple[Headers, str | None]:
        address = dict(headers)[contract.DECODE_HOST]
        others = (each for each in headers if each[0] != contract.DECODE_HOST)
        return ((contract.DESTINATION, address), *others), address.decode()


Gateway = BundledEnvoy | EndpointPicker
