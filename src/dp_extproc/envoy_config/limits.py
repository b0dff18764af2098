"""The limits that several parts of the Envoy configuration share, and how they follow from each other."""

from typing import Final

from dp_extproc.config import EnvoySettings

MAX_HEADERS_KB: Final = 1024
"""Header limit of the internal listeners; Envoy's default of 60 would refuse large batches.

The prefill prefix travels in a header. A batch adds a room (up to 19 digits) and a request id (about 35 bytes) for
every prompt, so 1 MiB carries more than 15,000 prompts. Envoy allows 8192.
"""

MAX_HEADERS_COUNT: Final = 200
"""Header count of the internal listeners: the 100 that a client may send (Envoy's default), and the router's own."""

UNLIMITED: Final = 1_000_000
"""A circuit breaker that never trips; Envoy's default of 1024 is soon reached by streams that last minutes."""


def buffer_bytes(settings: EnvoySettings) -> int:
    """Return what every hop of a request buffers: the largest body plus the prefix that rewriting adds.

    A prefix is no longer than a header may be. The service refuses a body above ``max_body_bytes`` itself; Envoy's
    own 413 is only the backstop behind it.
    """
    return settings.max_body_bytes + MAX_HEADERS_KB * 1024
