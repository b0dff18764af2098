"""What pydantic makes of routing fields that are not what they should be: something close, or SGLang's error."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from dp_extproc.engine.api.fields import InvalidBodyError, RoutingFields


class _LaxFields(BaseModel):
    """:class:`RoutingFields` once more; types as in ``managers/io_struct.py``."""

    rid: list[str] | str | None = None
    bootstrap_host: list[str | None] | str | None = None
    bootstrap_port: list[int | None] | int | None = None
    bootstrap_room: list[int | None] | int | None = None
    routed_dp_rank: int | None = None
    disagg_prefill_dp_rank: int | None = None
    data_parallel_rank: int | None = None


def coerce(given: Mapping[str, Any]) -> RoutingFields:
    """Read fields in pydantic's lax mode.

    Raises:
        InvalidBodyError: That is not possible.
    """
    try:
        return RoutingFields(**_LaxFields.model_validate(given).model_dump())
    except ValidationError as error:
        raise InvalidBodyError([_located(each) for each in error.errors(include_url=False)]) from None


def _located(error: Any) -> dict[str, Any]:
    return {
        "type": error["type"],
        "loc": ("body", *error["loc"]),
        "msg": error["msg"],
        "input": error["input"],
    }
