"""The keys of a configuration file as the models define them: sections, defaults, descriptions."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from dp_extproc.config.listen import SocketAddress
from dp_extproc.config.schema import Config
from dp_extproc.config.section import Section

_Type = TypeVar("_Type", Section, StrEnum)


def section_in(annotation: Any) -> type[Section] | None:
    """Find the section type inside ``X | None``, ``tuple[X, ...]`` and the like."""
    return _type_in(annotation, Section)


def mapping_in(annotation: Any) -> type[Section] | None:
    """Find the section type as :func:`section_in` does, unless the file writes it as a text."""
    found = section_in(annotation)
    return None if found is SocketAddress else found


def choices_in(annotation: Any) -> type[StrEnum] | None:
    """Find the type of a key that takes one of several words."""
    return _type_in(annotation, StrEnum)


def _type_in(annotation: Any, base: type[_Type]) -> type[_Type] | None:
    if isinstance(annotation, type) and issubclass(annotation, base):
        return annotation
    found = (_type_in(inner, base) for inner in getattr(annotation, "__args__", ()))
    return next((each for each in found if each is not None), None)


def section_at(path: Iterable[str | int]) -> type[Section]:
    """Return the section at a path of keys that exist."""
    section: type[Section] = Config
    for part in path:
        if isinstance(part, str):
            inner = section_in(section.model_fields[part].annotation)
            assert inner is not None, part  # noqa: S101 - paths end at sections
            section = inner
    return section


def sections() -> Iterator[type[Section]]:
    """List every section that the file writes as a mapping once, each before those in it."""
    found: list[type[Section]] = [Config]
    for section in found:
        yield section
        inner = (mapping_in(field.annotation) for field in section.model_fields.values())
        found += [each for each in dict.fromkeys(inner) if each is not None and each not in found]


def defaults_of(section: type[Section]) -> dict[str, Any]:
    """Return the keys that have a default, with it, as the file writes it."""
    return section.model_construct().model_dump(mode="json")


def describe(field: FieldInfo) -> str:
    """Return the description of a key: its own, or that of its section or choices, with a list of the choices."""
    section, choices = section_in(field.annotation), choices_in(field.annotation)
    text = field.description or inspect.getdoc(choices or section) or ""
    if choices is not None:
        documented = _documented(choices)
        text += "".join(f"\n- ``{each}``: {documented.get(each.name, '')}".rstrip(": ") for each in choices)
    return plain(text)


def plain(docstring: str) -> str:
    """Write a docstring for readers of YAML: each paragraph or item of a list on one line, null instead of None."""
    text = re.sub(r"\n(?![-\n])(?<!\n\n)", " ", docstring)
    return re.sub(r"\bNone\b", "null", text.replace("``", "`"))


@cache
def _documented(choices: type[StrEnum]) -> dict[str, str]:
    """Read the docstrings behind the members of an enumeration, by name. Python itself does not keep them."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(choices))).body
    assert isinstance(definition, ast.ClassDef)  # noqa: S101 - it is the source of a class
    found = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.Assign) and isinstance(following, ast.Expr):
            (name,) = statement.targets
            found[ast.unparse(name)] = inspect.cleandoc(ast.literal_eval(following.value))
    return found
