"""How the load of the engines is read."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from dp_extproc.config.section import Bytes, Seconds, Section


class LoadSource(StrEnum):
    """Which page of an engine tells its load."""

    AUTO = "auto"
    LOADS = "loads"
    METRICS = "metrics"


class LoadSignal(StrEnum):
    """What the tokens of a rank are, for policies that compare tokens."""

    ESTIMATE = "estimate"
    """What was sent and has not been worked off, by our own books, and what the engines show beyond it."""
    SCRAPED = "scraped"
    """The engine's gauge of used tokens, plus what was sent since it was read."""


class LoadSettings(Section):
    """How the engines' load is read, and what is made of it."""

    signal: LoadSignal = Field(default=LoadSignal.ESTIMATE, strict=False)
    source: LoadSource = Field(default=LoadSource.AUTO, strict=False)
    interval: Seconds = 1.0
    stale_after: Seconds = 5.0
    timeout: Seconds = 1.0
    """Hard limit of one scrape, from connecting to the last byte."""
    max_page_bytes: Bytes = 8 << 20
    """A load page larger than this is refused. Real pages with many ranks are below 1 MiB."""
    prefill_step_cost_tokens: Annotated[float, Field(ge=0, le=1e6, strict=False)] = 500.0
    """The fixed time of a prefill step, in tokens: 10 ms at 20 us per token. A wrong value costs little."""
    decode_request_cost_tokens: Annotated[float, Field(ge=0, le=1e6, strict=False)] = 1000.0
    """The fixed time of a sequence in a decode step, in tokens of context: 50 us at 50 ns per token."""

    @model_validator(mode="after")
    def _stale_is_later_than_the_next_scrape(self) -> Self:
        if self.stale_after <= self.interval:
            raise ValueError("stale_after must be longer than interval, or every sample is stale before the next one")
        return self
