"""Sections that keep requests from being lost: supervision, retry, outlier_detection, admission and queue."""

from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from dp_extproc.config.section import Seconds, Section, or_short

_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_Ratio = Annotated[float, Field(gt=0, le=1000, strict=False)]

LONGEST_QUEUE: Final = 15.0
"""Longest ``max_wait``, in seconds. Envoy waits 20 s for a reply; a request has to leave the queue before."""


class Supervise(StrEnum):
    """How far the service supervises the legs of a request."""

    OFF = "off"
    """The legs are independent. This mode is the cheapest."""
    LEGS = "legs"
    """A failed leg ends the other one, and response headers are held until prefill is done."""
    FIRST_EVENT = "first_event"
    """As ``legs``, and a stream is held until its first event is no error."""


_WORDS: Final = {"enum": [*Supervise, False]}
"""JSON Schema of a mode."""


def _off(value: object) -> object:
    """Take false, as which YAML reads a plain ``off``."""
    return Supervise.OFF.value if value is False else value


_PATIENCE: Final = 2.0
"""How many times longer than expected prefill may take."""


class SupervisionSettings(Section):
    """How the service supervises the two legs of a request. In the file a mode, or a mapping with ``mode``."""

    model_config = ConfigDict(json_schema_extra=or_short(_WORDS))

    mode: Annotated[Supervise, BeforeValidator(_off), WithJsonSchema(_WORDS)] = Field(
        default=Supervise.FIRST_EVENT, strict=False
    )
    prefill_timeout: Seconds = 280.0
    """Limit of prefill in seconds, its queue included. SGLang itself gives up after 300 s."""
    first_token_timeout: Seconds = 60.0
    """Limit in seconds from the end of prefill to the first event of a stream."""

    def prefill_timeout_of(self, expected: float) -> float:
        """Return the limit of prefill for a prompt that is expected to take so many seconds.

        Envoy holds a response for both timeouts together, so half of the other one is left for the first token.
        """
        return max(self.prefill_timeout, min(_PATIENCE * expected, self.longest_prefill))

    @property
    def longest_prefill(self) -> float:
        """The longest limit of prefill in seconds."""
        return self.prefill_timeout + self.first_token_timeout / 2

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: object) -> object:
        return {"mode": value} if isinstance(value, str) or value is False else value


class RetrySettings(Section):
    """When a request that failed before its first byte is scheduled again."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Largest number of attempts; 1 disables retries."""
    budget: Annotated[float, Field(ge=0, le=10, strict=False)] = 0.2
    """Retries that each request adds to the budget."""
    burst: _Count = 1000
    """Most retries in the budget. It bounds the requests that the loss of one engine can retry at once."""


class OutlierDetectionSettings(Section):
    """When an endpoint that fails is ejected, and for how long."""

    consecutive_failures: _Count = 3
    """Failures of its own leg in a row after which an endpoint is ejected."""
    base_ejection_time: Seconds = 1.0
    """Seconds of the first ejection; each further one is twice as long."""
    max_ejection_time: Seconds = 30.0
    """Seconds of the longest ejection."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.max_ejection_time < self.base_ejection_time:
            raise ValueError("max_ejection_time must not be shorter than base_ejection_time")
        return self


class AdmissionSettings(Section):
    """How much may be reserved on a rank before requests are refused with 429."""

    max_token_ratio: _Ratio | None = 4.0
    """Most tokens, as a multiple of the KV cache (``max_total_num_tokens``); None for no limit."""
    max_request_ratio: _Ratio | None = 4.0
    """Most requests, as a multiple of ``max_running_requests`` of the engine; None for no limit."""
    max_tokens: _Count | None = Field(default=None, examples=[400_000])
    """Most tokens on a rank; None for no limit."""
    max_requests: _Count | None = Field(default=None, examples=[256])
    """Most requests on a rank; None for no limit."""


class QueueSettings(Section):
    """The queue of requests that would be refused with 429."""

    max_wait: Annotated[Seconds, Field(le=LONGEST_QUEUE)] = 2.0
    """Most seconds that a request waits; at most 15 seconds."""
    max_depth: _Count = 1000
    """Most requests that wait at a time."""
