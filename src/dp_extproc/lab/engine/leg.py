"""Describe the sequences of a request to this engine, and how a sequence can end."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Leg:
    """One sequence of a request, with the routing fields that this release reads."""

    rid: str
    prompt_tokens: int
    max_new_tokens: int
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None
    routed_dp_rank: int | None = None
    """Until 0.5.9 the value of ``data_parallel_rank``."""
    disagg_prefill_dp_rank: int | None = None
    prompt: bytes = field(default=b"", repr=False)
    """The prompt's tokens, for the prefix cache."""


class RefusedError(Exception):
    """A request that never reaches a scheduler: SGLang's ValueError in the HTTP process, a 400."""

    def __init__(self, message: str, *, in_header: bool = False) -> None:
        """Keep the message.

        Args:
            message: SGLang's text.
            in_header: Whether it is about ``X-Data-Parallel-Rank``; such errors have a ``type`` of their own.
        """
        super().__init__(message)
        self.message = message
        self.in_header = in_header


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a sequence that a scheduler gave up."""

    status: int | None
    """None for a sequence that was aborted on request."""
    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a complete sequence."""

    length: int
    """What ``finish_reason`` reports: the output tokens, and 0 on prefill (``FINISH_LENGTH(length=0)``)."""
