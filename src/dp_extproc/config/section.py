"""Types that all sections of the configuration file share."""

import re
from collections.abc import Callable, Mapping
from ipaddress import IPv6Address
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

_DURATION: Final = re.compile(r"^(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h)$")
_SECONDS_PER_UNIT: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE: Final = re.compile(r"^(?P<number>\d+)(?P<unit>KiB|MiB|GiB)$")
_BYTES_PER_UNIT: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _seconds(value: object) -> object:
    """Read ``1s``, ``250ms``, ``2m``, ``1h`` as seconds; a bare number would leave the unit to guesswork."""
    if isinstance(value, str) and (match := _DURATION.match(value)):
        return float(match["number"]) * _SECONDS_PER_UNIT[match["unit"]]
    raise ValueError("write a duration with its unit, such as 250ms, 1s or 5m")


def _write_seconds(value: float) -> str:
    return f"{value:g}s" if value >= 1 else f"{value * 1000:g}ms"


def _bytes(value: object) -> object:
    """Read a plain number of bytes, or ``64MiB``."""
    if isinstance(value, str) and (match := _SIZE.match(value)):
        return int(match["number"]) * _BYTES_PER_UNIT[match["unit"]]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("write a number of bytes, such as 67108864, or a size such as 64MiB")


def _write_bytes(value: int) -> int | str:
    units = (f"{value // size}{unit}" for unit, size in reversed(_BYTES_PER_UNIT.items()) if value % size == 0)
    return next(units, value)


def _bare(host: str) -> str:
    """Take IPv6 out of its brackets. Any other colon begins a port, which has a key of its own."""
    bare = host.removeprefix("[").removesuffix("]")
    if ":" not in bare and bare == host:
        return host
    try:
        IPv6Address(bare)
    except ValueError:
        raise ValueError(f"{host!r} is no IPv6 address, and a port goes into a key of its own") from None
    return bare


Host = Annotated[str, Field(pattern=r"^(?:[A-Za-z0-9._:\-]+|\[[0-9A-Fa-f.:]+\])$"), AfterValidator(_bare)]
"""A name or an address. IPv6 may have brackets in the file, and has none here."""

Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(gt=0, allow_inf_nan=False),
    PlainSerializer(_write_seconds, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": r"^(?=.*[1-9])[0-9]+(\.[0-9]+)?(ms|s|m|h)$"}),
]
"""A duration in seconds; in the file a string with a unit."""

SecondsOrNone = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(ge=0, allow_inf_nan=False),
    PlainSerializer(_write_seconds, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": _DURATION.pattern.replace("?P<number>", "").replace("?P<unit>", "")}),
]
"""A duration in seconds that may be 0; in the file a string with a unit."""

Bytes = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(ge=1024),
    PlainSerializer(_write_bytes, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1024},
                {"type": "string", "pattern": "^0*[1-9][0-9]*(KiB|MiB|GiB)$"},
            ]
        }
    ),
]
"""A size in bytes; in the file a number, or a string with KiB, MiB or GiB."""

JsonSchema = dict[str, Any]


def text_like(pattern: str) -> WithJsonSchema:
    """Return the JSON Schema of a text, for a value that a function checks."""
    return WithJsonSchema({"type": "string", "pattern": pattern})


def or_short(short: Mapping[str, Any]) -> Callable[[JsonSchema], None]:
    """Let the JSON Schema of a section accept a shorter form of it, too."""

    def change(schema: JsonSchema) -> None:
        about: JsonSchema = {key: schema.pop(key) for key in ("title", "description") if key in schema}
        mapping = dict(schema)
        schema.clear()
        schema.update({**about, "anyOf": [dict(short), mapping]})

    return change


def is_given(key: str) -> JsonSchema:
    """Return the JSON Schema of a mapping that has a key. As in the loader, null counts as left out."""
    return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}


class Section(BaseModel):
    """A mapping of the file: frozen, without unknown keys, with exact types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
