"""The section ``load``: how the load of engines is read and used."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from dp_extproc.config.section import Bytes, Seconds, Section


class LoadSource(StrEnum):
    """Page of an engine from which its load is read."""

    AUTO = "auto"
    LOADS = "loads"
    METRICS = "metrics"


class LoadSignal(StrEnum):
    """What policies compare as the tokens of a rank."""

    ESTIMATE = "estimate"
    """The reservations, plus the external load that samples show."""
    SCRAPED = "scraped"
    """The engine's gauge of used tokens, plus the tokens sent since it was read."""


class LoadSettings(Section):
    """How the load of engines is read and used."""

    signal: LoadSignal = Field(default=LoadSignal.ESTIMATE, strict=False)
    source: LoadSource = Field(default=LoadSource.AUTO, strict=False)
    interval: Seconds = 1.0
    """Seconds between two readings of one engine."""
    stale_after: Seconds = 5.0
    """Seconds without a reading or a response after which an endpoint is stale. It is longer than ``interval``."""
    timeout: Seconds = 1.0
    """Limit of one reading in seconds, from connecting to the last byte."""
    max_page_bytes: Bytes = 8 << 20
    """Largest load page. Real pages with many ranks are below 1 MiB."""
    prefill_step_cost_tokens: Annotated[float, Field(ge=0, le=1e6, strict=False)] = 500.0
    """Fixed cost of a prefill step, in prompt tokens: 10 ms at 20 us per token. A wrong value costs little."""
    decode_request_cost_tokens: Annotated[float, Field(ge=0, le=1e6, strict=False)] = 1000.0
    """Fixed cost of a sequence in a decode step, in tokens of context: 50 us at 50 ns per token."""

    @model_validator(mode="after")
    def _stale_is_later_than_the_next_reading(self) -> Self:
        if self.stale_after <= self.interval:
            raise ValueError("stale_after must be longer than interval, or every sample is stale before the next one")
        return self
