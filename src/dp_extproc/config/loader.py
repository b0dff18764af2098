"""Reads the text of a file as a :class:`Config`, or finds every problem in it, with line and remedy."""

import difflib
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dp_extproc.config.problems import ConfigError, Key, Problem, spell
from dp_extproc.config.renamed import rename
from dp_extproc.config.schema import Config

Warn = Callable[[Problem], object]

_WORD_TAGS: Final = frozenset({"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"})
"""YAML's types of a key that is a text, or that merges another mapping (``<<``)."""
_OF_KEY: Final = "[key]"
"""Stands in pydantic's paths behind a key of a mapping if the key itself is wrong, not its value."""
_short: Final = reprlib.Repr()
"""Shortens wrong values in messages. Aliases can make a value of a few lines larger than any memory."""
_short.maxstring = _short.maxlong = _short.maxother = 80
_short.maxlevel = 2


def ignore(_warning: Problem) -> None:
    """Drop a warning, where another process logs it."""


def load_config(path: Path, warn: Warn = ignore) -> Config:
    """Read and check a configuration file; see :func:`read_config` and :func:`parse_config`."""
    return parse_config(read_config(path), str(path), warn)


def read_config(path: Path) -> str:
    """Read the text of a configuration file, or raise :class:`ConfigError` with the reason that it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Problem(None, "", f"cannot be read: {error}")]) from None


def parse_config(text: str, source: str = "configuration", warn: Warn = ignore) -> Config:
    """Check the text of a configuration file, or raise :class:`ConfigError` with every problem found.

    *source* is the name of the file in messages. *warn* is called for each old name in the text.
    """
    try:
        root, warnings, problems, data = _read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = f"is not valid YAML: {getattr(error, 'problem', None) or error}"
        raise ConfigError(source, [Problem(mark.line + 1 if mark else None, "", message)]) from None
    except RecursionError:
        raise ConfigError(source, [Problem(None, "", "is nested too deeply")]) from None
    for warning in warnings:
        warn(warning)
    if not isinstance(data, dict):
        raise ConfigError(source, [Problem(None, "", "must be a mapping with at least the key 'pools'")])
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += [_problem(detail, root) for detail in details if not _is_redundant(detail, details)]
    else:
        if not problems:
            return config
    raise ConfigError(source, sorted(problems, key=lambda problem: problem.line or 0))


class _Loader(yaml.SafeLoader):
    """The safe loader, which also reports the line of an impossible date or number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - as in the base class
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def _read_yaml(text: str) -> tuple[yaml.Node | None, list[Problem], list[Problem], Any]:
    """Return the nodes with their lines, the warnings and the problems of keys, and plain data."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        # Both before the data is made, which resolves merge keys (<<) in the nodes themselves.
        wrong_keys = list(_wrong_keys(root, set()))
        warnings, repeated = rename(root)
        data = None if root is None else loader.construct_document(root)
        return root, warnings, wrong_keys + repeated, data
    finally:
        loader.dispose()


def _wrong_keys(node: yaml.Node | None, visited: set[yaml.Node], at: Key = ()) -> Iterator[Problem]:
    """Find repeated keys, of which YAML silently takes the last, and keys that YAML does not read as text."""
    if node is None or node in visited:  # an alias leads to a node that was visited, or even to a parent
        return
    visited.add(node)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if key.tag not in _WORD_TAGS:
                yield Problem(key.start_mark.line + 1, spell((*at, name)), "is not a word to YAML; put it in quotes")
            elif name in seen:
                yield Problem(key.start_mark.line + 1, spell((*at, name)), "stands twice; keep one of them")
            seen.add(name)
            yield from _wrong_keys(value, visited, (*at, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _wrong_keys(value, visited, (*at, index))


def _is_redundant(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """Return whether another problem covers this one: the items of a list are all refused, or a key is no text."""
    if detail["type"] == "too_short":
        loc = detail["loc"]
        return any(other["loc"][: len(loc)] == loc and other is not detail for other in details)
    return detail["type"] == "invalid_key" or (detail["type"] == "string_type" and detail["loc"][-1] == _OF_KEY)


def _problem(detail: ErrorDetails, root: yaml.Node | None) -> Problem:
    loc = tuple(part for part in detail["loc"] if part != _OF_KEY)
    node = _locate(root, loc)
    return Problem(node.start_mark.line + 1 if node else None, spell(loc), _explain(detail))


def _locate(root: yaml.Node | None, loc: Key) -> yaml.Node | None:
    """Follow a path as far as the file goes. The place of a missing key is the mapping that lacks it."""
    node, place = root, root
    for part in loc:
        following: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    following, place = value, key
            if part == 0:  # one mapping stands for a list of one
                following = node
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            following = place = node.value[part]
        node = following
    return place


def _explain(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _keys_of(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}"
        return f"is not a known key; {hint}"
    found = _show(detail["input"])
    if kind in {"model_type", "model_attributes_type"}:
        return f"must be a mapping with keys such as {', '.join(_keys_of(detail['loc']))}, not {found}"
    if kind == "tuple_type":
        return f"must be a list, not {found}"
    if kind == "string_type":
        return f"must be a text, not {found}; put it in quotes"
    if kind == "missing":
        return "is missing; add it"
    if kind == "value_error":
        return str(context.get("error", detail["msg"]))
    if kind == "too_short":
        return "is empty; name at least one"
    if kind == "enum":
        return f"{found} is not one of {context['expected']}"
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, not {found}"


def _show(value: object) -> str:
    return "nothing" if value is None else _short.repr(value)


def _keys_of(loc: Key) -> list[str]:
    """List the keys of the section at *loc*."""
    model: Any = Config
    for part in loc:
        if isinstance(part, str):
            model = _section_in(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section_in(annotation: Any) -> Any:
    """Find the section type inside ``X | None``, ``tuple[X, ...]`` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None
