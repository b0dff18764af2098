"""Typed Envoy objects as YAML that an operator can read.

A builder attaches comments to the objects that it makes. They are no part of a message and are lost when it is
serialized; so :func:`pack` keeps the object itself beside the bytes of a ``typed_config``. Messages take no further
attributes and no place in a mapping: what belongs to one is kept by its identity, for as long as it lives.
"""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

import yaml
from betterproto2 import Casing, Message
from envoy_data_plane.google.protobuf import Any as PackedMessage

M = TypeVar("M", bound=Message)

_ITSELF: Final = ""
_comments: Final[dict[int, Mapping[str, str]]] = {}
_contents: Final[dict[int, Message]] = {}


class _Dumper(yaml.SafeDumper):
    """Writes scripts as blocks and repeats equal parts instead of referring to them."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def commented(message: M, comment: str | None = None, /, **fields: str) -> M:
    """Attach comments to *message*, and return it.

    Args:
        message: A part of what will be printed.
        comment: Text above the whole message, be it an item of a list or the value of a field.
        fields: Text above single fields, by name.
    """
    _comments[id(message)] = fields if comment is None else {_ITSELF: comment, **fields}
    weakref.finalize(message, _comments.pop, id(message), None)
    return message


def pack(message: Message) -> PackedMessage:
    """Pack *message* for a ``typed_config``, and keep its comments."""
    packed = PackedMessage.pack(message)
    _contents[id(packed)] = message
    weakref.finalize(packed, _contents.pop, id(packed), None)
    return packed


def render_yaml(message: Message) -> str:
    """Write *message* as commented YAML in a stable order. Every ``typed_config`` gets its ``@type``.

    Parts of one kind have the same comments; each text is printed once, at its first place.
    """
    data = message.to_dict(casing=Casing.SNAKE)
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    lines = text.splitlines()
    above: dict[str, int] = {}
    for comment, line in _comments_of(message, yaml.compose(text, Loader=yaml.SafeLoader), 0):
        above.setdefault(comment, line)
    rows: list[list[str]] = [[] for _ in lines]
    for comment, line in above.items():
        indent = " " * (len(lines[line]) - len(lines[line].lstrip()))
        rows[line] += [f"{indent}# {row}".rstrip() for row in comment.splitlines()]
    return "\n".join([*(row for number, line in enumerate(lines) for row in (*rows[number], line)), ""])


def _comments_of(value: Any, node: yaml.Node | None, line: int) -> Iterator[tuple[str, int]]:
    """Yield the comments of *value* and of all that is in it, from top to bottom.

    Args:
        value: A message, a list or mapping of them, or something without comments.
        node: The same as YAML.
        line: Where the value begins: with its key, or as an item of a list; counted from 0.
    """
    if isinstance(value, PackedMessage):
        value = _contents.get(id(value))
    attached = _comments.get(id(value), {})
    if _ITSELF in attached:
        yield attached[_ITSELF], line
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        for element, item in zip(value, node.value, strict=True):
            yield from _comments_of(element, item, item.start_mark.line)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            if key.value in attached:
                yield attached[key.value], key.start_mark.line
            inner = value.get(key.value) if isinstance(value, dict) else getattr(value, key.value, None)
            yield from _comments_of(inner, item, key.start_mark.line)
