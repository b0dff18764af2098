"""The section ``autoscaling``: how full engines shall be, from which the number of wanted endpoints follows."""

from typing import Annotated

from pydantic import Field

from dp_extproc.config.section import Seconds, Section

_Target = Annotated[float, Field(gt=0, le=1, strict=False)]


class AutoscalingSettings(Section):
    """The share of its capacity that each role shall have taken, on average over its engines."""

    prefill_target: _Target = 0.7
    """Share of prefill. Simulated, the mean time to first token is 1.12 s at 0.7, 1.45 s at 0.9 and 2.82 s at 0.97."""
    decode_target: _Target = 0.7
    """Share of decode. Scheduling avoids ranks above 0.85 of their KV cache; the rest is room while engines start."""
    worker_target: _Target = 0.7
    """Share of aggregated engines."""
    prefill_queue: Seconds = 10.0
    """Seconds within which the prompts that wait shall be computed, beside those that arrive.

    Shorter ones ask for more engines at a burst, which has mostly passed when they have started.
    """
