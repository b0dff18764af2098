"""What is done so that no request is lost: supervision, retries, health, admission and the queue."""

from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from dp_extproc.config.section import Seconds, Section

_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_Fill = Annotated[float, Field(gt=0, le=1000, strict=False)]

LONGEST_QUEUE: Final = 15.0
"""Seconds. Envoy waits 20 s for an answer of the service; a request must leave the queue before."""


class Supervise(StrEnum):
    """How far the legs of a request are watched."""

    OFF = "off"
    """Each leg for itself; the cheapest."""
    LEGS = "legs"
    """If one leg fails, the other is ended at once; the answer is held until prefill is done."""
    FIRST_EVENT = "first_event"
    """Likewise, and a stream is held until its first event is seen not to be an error."""


class SupervisionSettings(Section):
    """How the two legs of a request are watched. In the file a word, or a mapping with ``mode``."""

    mode: Supervise = Field(default=Supervise.FIRST_EVENT, strict=False)
    prefill_timeout: Seconds = 280.0
    """How long prefill may take, its queue included. SGLang itself gives up after 300 s."""
    first_token_timeout: Seconds = 60.0
    """How long a stream may take from the end of prefill to its first event."""

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, value: object) -> object:
        if value is False:  # YAML reads a plain "off" as false
            value = Supervise.OFF.value
        return {"mode": value} if isinstance(value, str) else value


class RetrySettings(Section):
    """When a request that failed before its first byte is placed anew."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """In all; 1 for no retries."""
    budget: Annotated[float, Field(ge=0, le=10, strict=False)] = 0.2
    """Retries that each request adds to those which may be made."""
    burst: _Count = 1000
    """Retries that may be made at once; as many requests as one engine's death may hit."""


class OutlierDetectionSettings(Section):
    """When an endpoint that fails is left alone, and for how long."""

    consecutive_failures: _Count = 3
    """In a row, of its own leg."""
    base_ejection_time: Seconds = 1.0
    """The first time; each time that follows twice as long ..."""
    max_ejection_time: Seconds = 30.0
    """... up to this."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.max_ejection_time < self.base_ejection_time:
            raise ValueError("max_ejection_time must not be shorter than base_ejection_time")
        return self


class AdmissionSettings(Section):
    """How much a rank may have on its books before requests are refused with 429."""

    max_token_ratio: _Fill | None = 4.0
    """Tokens, as a multiple of the KV cache (``max_total_num_tokens``); None for no limit."""
    max_request_ratio: _Fill | None = 4.0
    """Requests, as a multiple of what the engine runs at a time (``max_running_requests``); None for no limit."""
    max_tokens: _Count | None = None
    """Tokens on a rank, in addition."""
    max_requests: _Count | None = None
    """Requests on a rank, in addition."""


class QueueSettings(Section):
    """Where requests wait that would be refused with 429."""

    max_wait: Annotated[Seconds, Field(le=LONGEST_QUEUE)] = 2.0
    max_depth: _Count = 1000
