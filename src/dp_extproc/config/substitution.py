"""Environment variables in the values of a configuration file: ``${NAME}``, ``${NAME:-default}``.

The references are replaced in the YAML nodes, before old names are replaced and before anything is checked. So keys and
comments stay as they are, and a value cannot change the structure of the file. A plain scalar gets its type anew, so
``${N}`` may be a number. A quoted one stays a text.
"""

from collections.abc import Callable, Iterator, Mapping, MutableSequence
from typing import Any, Final

import yaml

from dp_extproc.config.problems import Key, Problem, spell
from dp_extproc.variables import expand

_TEXT: Final = "tag:yaml.org,2002:str"

Resolve = Callable[[type[yaml.Node], str, tuple[bool, bool]], str]
"""Finds the YAML type of a scalar, as :meth:`yaml.SafeLoader.resolve` does."""


def substitute(root: yaml.Node | None, environment: Mapping[str, str], resolve: Resolve) -> list[Problem]:
    """Replace references in place. Returns a problem for each value whose reference cannot be replaced."""
    problems: list[Problem] = []
    for values, index, node, at in list(_scalars(root, (), set())):
        try:
            text = expand(node.value, environment)
        except ValueError as error:
            problems.append(Problem(node.start_mark.line + 1, spell(at), str(error)))
            continue
        if text != node.value:
            is_plain = node.style is None and node.tag == _TEXT
            tag = resolve(yaml.ScalarNode, text, (True, False)) if is_plain else node.tag
            # A node of its own: a key that is an alias of the old one keeps its text.
            new = yaml.ScalarNode(tag, text, node.start_mark, node.end_mark, node.style)
            values[index] = (values[index][0], new) if isinstance(values[index], tuple) else new
    return problems


def _scalars(
    node: yaml.Node | None, at: Key, visited: set[yaml.Node]
) -> Iterator[tuple[MutableSequence[Any], int, yaml.ScalarNode, Key]]:
    """Find every scalar value: the list of entries or items that holds it, the index there, the node, its path."""
    if node is None or node in visited:  # an alias leads to a node that was visited, or even to a parent
        return
    visited.add(node)
    children: list[tuple[int | str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = list(enumerate(node.value))
    for index, (part, child) in enumerate(children):
        if isinstance(child, yaml.ScalarNode):
            yield node.value, index, child, (*at, part)
        else:
            yield from _scalars(child, (*at, part), visited)
