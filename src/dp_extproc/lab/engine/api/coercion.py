"""What pydantic makes of routing fields that are not what they should be: something close, or SGLang's error."""

from collections.abc import Mapping
from typing import Any, Final

from msgspec.structs import fields
from pydantic import ValidationError, create_model

from dp_extproc.lab.engine.api.fields import InvalidBodyError, RoutingFields

_KNOWN: Final[dict[str, Any]] = {each.name: (each.type, None) for each in fields(RoutingFields)}
_LaxFields: Final = create_model("_LaxFields", **_KNOWN)
"""The same fields, read as FastAPI reads them; types as in ``managers/io_struct.py``."""


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
