"""A configuration file with every key, its description and its default, to begin with."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from dp_extproc import __version__
from dp_extproc.config.keys import defaults_of, describe, mapping_in
from dp_extproc.config.schema import Config
from dp_extproc.config.section import Section

_WIDTH: Final = 110
_HEAD: Final = f"""\
# Configuration of dp-extproc {__version__} with every key.
#
# Only pools are required. All other values are the defaults, and may be left out. To use a key behind #, remove the #.
# Every value may contain environment variables: ${{NAME}} or ${{NAME:-default}}.
#
# `dp-extproc schema > dp-extproc.schema.json` writes a schema for editors. Name it in the first line of this file:
#   # yaml-language-server: $schema=dp-extproc.schema.json
"""
_MINIMAL: Final[Mapping[str, Any]] = {
    "pools": [
        {
            "models": ["*"],
            "prefill": {"endpoints": [{"url": "http://127.0.0.1:31001"}]},
            "decode": {"endpoints": ["http://127.0.0.1:32001"]},
        }
    ]
}
"""The keys in use that have no default: a pool with the engines of the quick start."""


def template() -> str:
    """Write the file. Descriptions begin with ``# ``, and keys that are not in use with ``#`` alone."""
    return _HEAD + "\n".join(_Writer().section(Config, "", _MINIMAL, off=False, apart=True)) + "\n"


class _Writer:
    """Writes sections, each with all of its keys where it occurs first."""

    def __init__(self) -> None:
        self._written: set[type[Section]] = set()

    def section(
        self, section: type[Section], pad: str, given: Mapping[str, Any], *, off: bool, apart: bool = False
    ) -> Iterator[str]:
        """Write the keys of a section behind *pad*; those in *given* first, and all as comments if it is *off*.

        With *apart* an empty line separates the keys.
        """
        self._written.add(section)
        defaults = defaults_of(section)
        for key in sorted(section.model_fields, key=lambda key: key not in given):
            field = section.model_fields[key]
            if apart:
                yield ""
            for paragraph in describe(field).splitlines():
                yield from textwrap.wrap(
                    paragraph,
                    _WIDTH,
                    initial_indent=f"{pad}# ",
                    subsequent_indent=f"{pad}#   " if paragraph.startswith("- ") else f"{pad}# ",
                    break_on_hyphens=False,
                )
            default = defaults.get(key)
            is_used = key in given or default not in (None, [])
            mark = f"{pad}#" if off or not is_used else pad
            inner = mapping_in(field.annotation)
            if inner is None or inner in self._written:
                value = given.get(key, default if is_used else (field.examples or [None])[0])
                yield f"{mark}{key}: {_flow(value)}"
                continue
            yield f"{mark}{key}:"
            inside = given.get(key, {})
            is_list = isinstance(inside, list)
            lines = self.section(inner, f"{pad}  ", inside[0] if is_list else inside, off=off or not is_used)
            yield from _as_item(lines, pad) if is_list else lines


def _as_item(lines: Iterator[str], pad: str) -> Iterator[str]:
    """Make the first item of a list of the lines of a mapping."""
    for line in lines:
        if line.lstrip().startswith("# "):
            yield line.removeprefix("  ")
        else:
            yield f"{pad}- {line.strip()}"
            break
    yield from lines


def _flow(value: Any) -> str:
    """Write a value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
