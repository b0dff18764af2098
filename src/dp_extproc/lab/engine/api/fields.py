"""Read the routing fields of a body and of headers as a release does on a path."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from pydantic import ValidationError, create_model

from dp_extproc.lab.engine.leg import Leg, RefusedError
from dp_extproc.lab.engine.release import Release
from dp_extproc.lab.engine.text import count_tokens

_BOOTSTRAP: Final = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
_RANKS: Final = ("routed_dp_rank", "disagg_prefill_dp_rank")
_INTEGERS: Final = (*_RANKS, "data_parallel_rank")
_MAX_I64: Final = (1 << 63) - 1
_MAX_U64: Final = (1 << 64) - 1


class InvalidBodyError(Exception):
    """The error that FastAPI raises as RequestValidationError."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        """Keep pydantic's list of errors."""
        super().__init__("invalid body")
        self.errors = errors


class InvalidTypeError(Exception):
    """The error of the second check of ``/generate`` from 0.5.22 on (``api/v1/api_types.py``)."""


class RoutingFields(msgspec.Struct):
    """All fields that decide where a request runs."""

    rid: list[str] | str | None = None
    bootstrap_host: list[str | None] | str | None = None
    bootstrap_port: list[int | None] | int | None = None
    bootstrap_room: list[int | None] | int | None = None
    routed_dp_rank: int | None = None
    disagg_prefill_dp_rank: int | None = None
    data_parallel_rank: int | None = None


_TYPES: Final[dict[str, Any]] = {each.name: (each.type, None) for each in msgspec.structs.fields(RoutingFields)}
_LaxFields: Final = create_model("_LaxFields", **_TYPES)
"""The same fields, read as FastAPI reads them; types as in ``managers/io_struct.py``."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Read the routing fields of one path."""

    release: Release
    path: str
    overrides: bool
    """Whether the engine was started with SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES."""

    def names(self) -> list[str]:
        """List the body fields that are read."""
        names = [] if self.path in {"/v1/messages", "/v1/responses"} else ["rid"]
        if self.release.takes_bootstrap(self.path):
            names += _BOOTSTRAP
            if self.release.routes_by_field:
                names += _RANKS
        if self.release.takes_data_parallel_rank(self.path):
            names.append("data_parallel_rank")
        return names

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> RoutingFields:
        """Read the fields of a request.

        Raises:
            InvalidBodyError: A value has a wrong type.
            InvalidTypeError: A value of ``/generate`` only looks right.
            RefusedError: A routing header is wrong.
        """
        given = {name: _as_parsed_by_orjson(body[name]) for name in self.names() if name in body}
        try:
            fields = msgspec.convert(given, RoutingFields)
        except msgspec.ValidationError:
            fields = _coerced(given)
        if self.path == "/generate" and self.release.strict_generate:
            for name, value in given.items():
                _check_strictly(name, value)
        if fields.routed_dp_rank is None:
            fields.routed_dp_rank = fields.data_parallel_rank
        if self.release.reads_rank_header(self.path) and (text := headers.get("x-data-parallel-rank")) is not None:
            try:
                fields.routed_dp_rank = int(text)
            except ValueError:
                message = f"Invalid X-Data-Parallel-Rank header: must be an integer, got {text!r}"
                raise RefusedError(message, in_header=True) from None
        if self.overrides and self.release.reads_overrides(self.path):
            _override(fields, headers)
        return fields


def read_rank_header(headers: Mapping[str, str]) -> RoutingFields:
    """Read the routing field of vLLM; a value that is no number counts as absent (``_get_data_parallel_rank``)."""
    fields = RoutingFields()
    try:
        fields.routed_dp_rank = int(headers.get("x-data-parallel-rank", ""))
    except ValueError:
        fields.routed_dp_rank = None
    return fields


def legs(
    fields: RoutingFields, prompts: list[bytes], max_new_tokens: int, samples: int, *, is_batch: bool
) -> list[Leg]:
    """Make one leg per prompt and sample.

    With several samples all of a prompt share its room, as in ``tokenizer_manager.py``; that is why n > 1 does not
    work in disaggregated mode.

    Args:
        fields: The routing fields of the whole request.
        prompts: The tokens of each prompt.
        max_new_tokens: Output tokens of every sequence.
        samples: Sequences per prompt.
        is_batch: Whether the prompts came as a list, even of one.

    Raises:
        IndexError: A list of bootstrap fields is too short.
        RefusedError: A list of ids does not fit.
    """
    if isinstance(fields.rid, list) and len(fields.rid) != len(prompts):
        raise RefusedError("The specified rids length mismatch with the batch_size for batch processing.")
    found = []
    for index, prompt in enumerate(prompts):
        for sample in range(samples):
            rid = _item(fields.rid, index)
            if isinstance(fields.rid, str) and is_batch:
                rid = f"{fields.rid}_{index}"
            if rid is None or sample:
                rid = uuid.uuid4().hex
            room = _item(fields.bootstrap_room, index)
            if isinstance(fields.bootstrap_room, int):
                room = fields.bootstrap_room + index  # io_struct.py: R, R+1, ...
            found.append(
                Leg(
                    rid=rid,
                    prompt_tokens=count_tokens(prompt),
                    prompt=prompt,
                    max_new_tokens=max_new_tokens,
                    bootstrap_host=_item(fields.bootstrap_host, index),
                    bootstrap_port=_item(fields.bootstrap_port, index),
                    bootstrap_room=room,
                    routed_dp_rank=fields.routed_dp_rank,
                    disagg_prefill_dp_rank=fields.disagg_prefill_dp_rank,
                )
            )
    return found


def _item(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list) else value


def _coerced(given: Mapping[str, Any]) -> RoutingFields:
    """Read fields in pydantic's lax mode, which converts values of some other types.

    Raises:
        InvalidBodyError: That is not possible.
    """
    try:
        return RoutingFields(**_LaxFields.model_validate(given).model_dump())
    except ValidationError as error:
        raise InvalidBodyError(
            [
                {"type": each["type"], "loc": ("body", *each["loc"]), "msg": each["msg"], "input": each["input"]}
                for each in error.errors(include_url=False)
            ]
        ) from None


def _as_parsed_by_orjson(value: Any) -> Any:
    """Convert integers beyond 64 bits as SGLang's JSON parser does, which is visible in error texts."""
    if isinstance(value, list):
        return [_as_parsed_by_orjson(each) for each in value]
    if isinstance(value, int) and not -_MAX_I64 - 1 <= value <= _MAX_U64:
        return float(value)
    return value


def _check_strictly(name: str, value: Any) -> None:
    if value is None or name in {"rid", "bootstrap_host"}:
        return
    values, expected = [value], "i64"
    if name not in _INTEGERS:
        expected = "a value or an array of values for OptionalInt64OrList"
        values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool):
            raise InvalidTypeError(f"invalid type: boolean `{str(each).lower()}`, expected {expected}")
        if isinstance(each, str):
            escaped = each.replace('"', '\\"')
            raise InvalidTypeError(f'invalid type: string "{escaped}", expected {expected}')
        if isinstance(each, float):
            raise InvalidTypeError(f"invalid type: floating point `{each}`, expected {expected}")
        if isinstance(each, int) and not -_MAX_I64 - 1 <= each <= _MAX_I64:
            raise InvalidTypeError(f"invalid value: integer `{each}`, expected i64")


def _override(fields: RoutingFields, headers: Mapping[str, str]) -> None:
    for name in RoutingFields.__struct_fields__:
        header = f"x-override-{name.replace('_', '-')}"
        if name == "data_parallel_rank" or (text := headers.get(header)) is None:
            continue
        if name in {"rid", "bootstrap_host"}:
            setattr(fields, name, text)
            continue
        try:
            setattr(fields, name, int(text))
        except ValueError as error:
            raise RefusedError(f"invalid {header} header {text!r}: {error}") from None
