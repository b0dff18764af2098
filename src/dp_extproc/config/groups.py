"""Revision groups of a pool: which share of its requests each group gets."""

import re
from collections.abc import Mapping
from typing import Annotated, Final, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from dp_extproc.config.discovery import Group
from dp_extproc.config.section import Section

_PERCENT: Final = re.compile(r"(\d+(?:\.\d+)?) ?%")
_ROUNDING: Final = 1e-9
"""Bounds the error of a sum of shares, such as 0.7 + 0.2 + 0.1."""


def _share(value: object) -> object:
    """Read ``5%`` or ``0.05`` as a share. A whole number could be either."""
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        value = float(match[1]) / 100
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    raise ValueError("write a share of the requests from 0% to 100%, such as 5% or 0.05")


Share = Annotated[
    float,
    BeforeValidator(_share),
    Field(ge=0, le=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?%$"},
            ]
        }
    ),
]
"""A share of the requests; in the file ``5%`` or ``0.05``."""


class GroupSettings(Section):
    """How the requests of a pool are divided among its revision groups."""

    weights: Mapping[Group, Share] = Field(default={}, strict=False)
    """Share of the requests of each named group. All other endpoints share what is left, by their load."""

    @model_validator(mode="after")
    def _weights_are_not_more_than_all(self) -> Self:
        if (total := sum(self.weights.values())) > 1 + _ROUNDING:
            raise ValueError(f"the weights add up to {total * 100:g}%; lower them to 100% or less")
        return self
