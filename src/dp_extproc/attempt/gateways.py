"""The two kinds of gateways: whose headers are trusted, and what a gateway lets the service do."""

from collections.abc import Mapping
from typing import Final, Protocol

from msgspec import Struct

from dp_extproc import contract

Headers = tuple[tuple[str, bytes], ...]


class Earlier(Struct, frozen=True):
    """The earlier attempts of a request, as the gateway reports them."""

    failed: tuple[frozenset[str], ...] = ()
    """Addresses of the endpoints of each attempt, the last one's at the end."""
    lost: str | None = None
    """Address of the endpoint that dropped the last attempt, if that failure was not counted yet."""


FIRST_ATTEMPT: Final = Earlier()


class Gateway(Protocol):
    """What differs between the gateways that send requests here."""

    @property
    def holds_responses(self) -> bool:
        """Whether a response may be held, replaced by an error, and retried."""

    @property
    def opens_leg_streams(self) -> bool:
        """Whether prefill legs and first events have streams of their own, named in the initial metadata."""

    @property
    def names_subsets(self) -> bool:
        """Whether the metadata of a request may name the endpoints that it can go to."""

    @property
    def passes_other_paths(self) -> bool:
        """Whether requests that the service does not read go to any endpoint."""

    @property
    def session_header(self) -> str | None:
        """The header that names the conversation; None for none."""

    def untrusted(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        """Name the headers that a client must not have set, so that they are removed."""
        ...

    def earlier(self, headers: Mapping[str, str]) -> Earlier:
        """Read the earlier attempts of a request."""
        ...

    def destination(self, headers: Headers) -> tuple[Headers, str | None]:
        """Write where a request goes.

        Args:
            headers: Headers of a decision, with :data:`.contract.DECODE_HOST`.

        Returns:
            The headers to set, and the ``IP:port`` for the metadata of the gateway's load balancing.
        """
        ...


class BundledEnvoy:
    """The Envoy that ``envoy-config`` prints. It removes from clients' requests every header that it sets itself."""

    holds_responses = True
    opens_leg_streams = True
    names_subsets = False
    passes_other_paths = False
    session_header: str | None = contract.SESSION

    def untrusted(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(headers.keys() - contract.READ_FROM_REQUESTS)

    def earlier(self, headers: Mapping[str, str]) -> Earlier:
        avoided = headers.get(contract.AVOID)
        return Earlier(contract.read_failed(avoided), contract.read_cut(avoided)) if avoided else FIRST_ATTEMPT

    def destination(self, headers: Headers) -> tuple[Headers, str | None]:
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
        """Set up.

        Args:
            session_header: The clients' header that names a conversation; the bundled Envoy copies it instead.
        """
        self.session_header = session_header
        self._read = contract.READ_BEHIND_OTHERS | {session_header}

    def untrusted(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        # Envoy would not let x-envoy- headers be removed.
        return tuple(name for name in headers.keys() - self._read if not name.startswith("x-envoy-"))

    def earlier(self, headers: Mapping[str, str]) -> Earlier:  # noqa: ARG002 - no header is trusted
        return FIRST_ATTEMPT

    def destination(self, headers: Headers) -> tuple[Headers, str | None]:
        address = dict(headers)[contract.DECODE_HOST]
        others = (each for each in headers if each[0] != contract.DECODE_HOST)
        return ((contract.DESTINATION, address), *others), address.decode()
