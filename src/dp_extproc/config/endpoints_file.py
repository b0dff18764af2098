"""A file of endpoints as typed data: a list of entries, or a mapping with the key ``endpoints``. YAML or JSON."""

import json
from typing import Annotated, Any, Final

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from dp_extproc.config.discovery import MemberState
from dp_extproc.config.pools import EndpointConfig
from dp_extproc.config.problems import spell
from dp_extproc.config.yaml_loader import FastLoader, place_and_problem

_SHOWN: Final = 3
"""Bounds the problems of one message; a file of a thousand entries may have as many."""
_Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[\x21-\x7e]+$")]


class FileEntry(EndpointConfig):
    """One entry: a URL, or a mapping with ``url``, the keys of an endpoint in the configuration, and these."""

    name: _Name | None = None
    """Name of the engine for logs. Another name at the same URL is another engine."""
    state: MemberState = Field(default=MemberState.READY, strict=False)


_ENTRIES: Final = TypeAdapter(Annotated[tuple[FileEntry, ...], Field(strict=False)])


def parse_endpoints(text: str) -> tuple[FileEntry, ...]:
    """Check the text of a file of endpoints.

    Raises:
        ValueError: It cannot be used. The message has the place of each problem, and the remedy.
    """
    data = _read(text)
    if isinstance(data, dict) and data.keys() == {"endpoints"}:
        data = data["endpoints"]
    if not isinstance(data, list):
        message = "must be a list of endpoints, or a mapping with the key endpoints alone; for none write []"
        raise ValueError(message)  # noqa: TRY004 - one kind of refusal for all texts
    try:
        return _ENTRIES.validate_python(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    shown = [f"{spell(each['loc'])}: {each['msg'].removeprefix('Value error, ')}" for each in details[:_SHOWN]]
    more = f"; and {len(details) - _SHOWN} more" if len(details) > _SHOWN else ""
    raise ValueError(f"{'; '.join(shown)}{more}")


def _read(text: str) -> Any:
    try:
        return json.loads(text)  # YAML contains JSON, but its loader is slow
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.load(text, Loader=FastLoader)  # noqa: S506 - it is a safe loader
    except yaml.YAMLError as error:
        line, problem = place_and_problem(error)
        raise ValueError(f"line {line}: {problem}" if line else problem) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
