"""Revision groups of a pool: which share of its requests each group gets."""

import re
from collections.abc import Mapping
from typing import Annotated, Final, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from dp_extproc.config.discovery import Group
from dp_extproc.config.section import Section

_PERCENT: Final = r"^(100(?:\.0+)?|[0-9]{1,2}(?:\.[0-9]+)?) ?%$"
_ROUNDING: Final = 1e-9
"""Bounds the error of a sum of shares, such as 0.7 + 0.2 + 0.1."""


def _share(value: object) -> object:
    """Read ``5%`` or ``0.05`` as a share. A 1 could be a percentage or everything."""
    if isinstance(value, str) and (match := re.match(_PERCENT, value)):
        return float(match[1]) / 100
    if isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ValueError("write a share of the requests from 0% to 100%, such as 5% or 0.05")


Share = Annotated[
    float,
    BeforeValidator(_share),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": _PERCENT}, {"type": "number", "minimum": 0, "exclusiveMaximum": 1}]}
    ),
]
"""A share of the requests; in the file ``5%`` or ``0.05``."""


class GroupSettings(Section):
    """How the requests of a pool are divided among its revision groups."""

    weights: Mapping[Group, Share] = Field(default={}, strict=False)
    """Share of the requests of each named group, such as ``{v2: 5%}``. All other endpoints share what is left."""

    @model_validator(mode="after")
    def _weights_are_not_more_than_all(self) -> Self:
        if (total := sum(self.weights.values())) > 1 + _ROUNDING:
            raise ValueError(f"the weights add up to {total * 100:g}%; lower them to 100% or less")
        return self
