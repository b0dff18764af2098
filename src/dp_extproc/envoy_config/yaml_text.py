"""Typed Envoy objects as commented YAML.

1. A builder attaches comments to the messages that it makes, so a text stands beside the call that it explains.
2. Serializing a message drops its comments. Therefore :func:`pack` keeps the message beside the bytes.
3. Messages accept no attributes and are not hashable. Their comments are kept by identity, until the message is freed.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import yaml
from betterproto2 import Casing, Message
from envoy_data_plane.google.protobuf import Any as PackedMessage


class Fields(dict[str, Any]):
    """A mapping that can have comments, such as a part of a resource of Kubernetes."""


M = TypeVar("M", bound=Message | Fields)

_ITSELF: Final = ""
_comments: Final[dict[int, Mapping[str, str]]] = {}
_contents: Final[dict[int, Message]] = {}


class _Dumper(yaml.SafeDumper):
    """A dumper that writes scripts as blocks, and repeats equal parts instead of referring to them."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def commented(message: M, comment: str | None = None, /, **fields: str) -> M:
    """Attach comments to *message* and return it.

    Args:
        message: A part of the printed configuration: a message or :class:`Fields`.
        comment: Text above the whole message, as an item of a list or as the value of a field.
        fields: Texts above single fields, by the field's name.
    """
    _comments[id(message)] = fields if comment is None else {_ITSELF: comment, **fields}
    weakref.finalize(message, _comments.pop, id(message), None)
    return message


def pack(message: Message) -> PackedMessage:
    """Pack *message* for a ``typed_config`` and keep its comments."""
    packed = PackedMessage.pack(message)
    _contents[id(packed)] = message
    weakref.finalize(packed, _contents.pop, id(packed), None)
    return packed


def unpack(packed: PackedMessage) -> Message | None:
    """Return the message that :func:`pack` packed, with its comments, or None for one that was packed elsewhere."""
    return _contents.get(id(packed))


Document = Message | Mapping[str, Any] | Sequence[Any]
"""A message, or a mapping or a list with messages inside, such as a resource of Kubernetes."""


def plain(value: Any) -> Any:
    """Convert every message inside *value* to mappings and lists. Every ``typed_config`` gets its ``@type``."""
    if isinstance(value, Message):
        return value.to_dict(casing=Casing.SNAKE)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def render_yaml(document: Document) -> str:
    """Write *document* as commented YAML in a stable order. Every ``typed_config`` gets its ``@type``.

    One builder makes several parts of one kind with equal comments. Each text is printed once, at its first place.
    """
    text = yaml.dump(plain(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    lines = text.splitlines()
    above: dict[str, int] = {}
    for comment, line in _comments_of(document, yaml.compose(text, Loader=yaml.SafeLoader), 0):
        above.setdefault(comment, line)
    rows: list[list[str]] = [[] for _ in lines]
    for comment, line in above.items():
        indent = " " * (len(lines[line]) - len(lines[line].lstrip()))
        rows[line] += [f"{indent}# {row}".rstrip() for row in comment.splitlines()]
    return "\n".join([*(row for number, line in enumerate(lines) for row in (*rows[number], line)), ""])


def _comments_of(value: Any, node: yaml.Node | None, line: int) -> Iterator[tuple[str, int]]:
    """Yield the comments of *value* and of everything inside it with their lines, from top to bottom.

    Args:
        value: A message, a list or mapping of messages, or a value that has no comments.
        node: The same value as YAML.
        line: Line of the value's key, or of the list item that the value is; counted from 0.
    """
    if isinstance(value, PackedMessage):
        value = unpack(value)
    attached = _comments.get(id(value), {})
    if _ITSELF in attached:
        yield attached[_ITSELF], line
    if isinstance(node, yaml.SequenceNode) and isinstance(value, (list, tuple)):
        for element, item in zip(value, node.value, strict=True):
            yield from _comments_of(element, item, item.start_mark.line)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            if key.value in attached:
                yield attached[key.value], key.start_mark.line
            inner = value.get(key.value) if isinstance(value, Mapping) else getattr(value, key.value, None)
            yield from _comments_of(inner, item, key.start_mark.line)
