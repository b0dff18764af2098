"""Reads the text of a file as a :class:`Config`, or finds every problem in it, with line and remedy."""

import difflib
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dp_extproc.config.keys import section_at
from dp_extproc.config.problems import ConfigError, Key, Problem, spell
from dp_extproc.config.renamed import rename
from dp_extproc.config.schema import Config
from dp_extproc.config.substitution import substitute
from dp_extproc.config.yaml_loader import SafeLoader, place_and_problem

Warn = Callable[[Problem], object]
NO_VARIABLES: Final[Mapping[str, str]] = MappingProxyType({})

_WORD_TAGS: Final = frozenset({"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"})
"""YAML's types of a key that is a text, or that merges another mapping (``<<``)."""
_OF_KEY: Final = "[key]"
"""Stands in pydantic's paths behind a key of a mapping if the key itself is wrong, not its value."""
_short: Final = reprlib.Repr()
"""Shortens wrong values in messages."""
_short.maxstring = _short.maxlong = _short.maxother = 80
_SECRETS: Final = frozenset({"api_key", "url"})
"""Keys whose values messages do not show, since they may be an API key or have a password."""


def ignore(_warning: Problem) -> None:
    """Drop a warning, where another process logs it."""


def parse_config(
    text: str, source: str = "configuration", warn: Warn = ignore, environment: Mapping[str, str] = NO_VARIABLES
) -> Config:
    """Check the text of a configuration file, or raise :class:`ConfigError` with every problem found.

    *source* is the name of the file in messages. *warn* is called for each old name in the text. *environment* has the
    variables for ``${NAME}`` in values.
    """
    try:
        root, warnings, problems, unset, data = _read_yaml(text, environment)
    except yaml.YAMLError as error:
        raise ConfigError(source, [_not_yaml(error, text)]) from None
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
        found = [_problem(detail, root) for detail in details if not _is_redundant(detail, details)]
        problems += [
            each for each in found if not any(each.line == u.line and each.key.startswith(u.key) for u in unset)
        ]
    else:
        if not problems + unset:
            return config
    raise ConfigError(source, sorted(problems + unset, key=lambda problem: problem.line or 0))


def _not_yaml(error: yaml.YAMLError, text: str) -> Problem:
    line, message = place_and_problem(error)
    if line is not None and any("${" in each for each in text.splitlines()[line - 1 : line]):
        message += "; between [ ] and { } a value with ${...} needs quotes"
    return Problem(line, "", message)


def _read_yaml(
    text: str, environment: Mapping[str, str]
) -> tuple[yaml.Node | None, list[Problem], list[Problem], list[Problem], Any]:
    """Return the nodes with their lines, the warnings, the problems of keys and of variables, and plain data."""
    loader = SafeLoader(text)
    try:
        root = loader.get_single_node()
        # All before the data is made, which resolves merge keys (<<) in the nodes themselves.
        wrong_keys = list(_wrong_keys(root, set()))
        unset = substitute(root, environment, loader.resolve)
        warnings, repeated = rename(root)
        data = None if root is None else loader.construct_document(root)
        return root, warnings, wrong_keys + repeated, unset, data
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
        known = list(section_at(detail["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}"
        return f"is not a known key; {hint}"
    found = "the value that stands here" if _SECRETS & set(detail["loc"]) else _show(detail["input"])
    if kind in {"model_type", "model_attributes_type"}:
        return f"must be a mapping with keys such as {', '.join(section_at(detail['loc']).model_fields)}, not {found}"
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
    is_quoted = kind == "int_type" and isinstance(detail["input"], str) and detail["input"].isdecimal()
    hint = "; write it without quotes, and a variable on a line of its own" if is_quoted else ""
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, not {found}{hint}"


def _show(value: object) -> str:
    """Describe a wrong value. What is in a mapping or a list may be secret, or larger than any memory by aliases."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else _short.repr(value)
