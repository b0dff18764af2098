"""From the typed bootstrap to YAML that an operator can read."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from betterproto2 import Casing
from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap

from dp_extproc.envoy_config.comments import COMMENTS, HEADER

Path = tuple[str, ...]


class _Dumper(yaml.SafeDumper):
    """Writes scripts as blocks and repeats equal parts instead of referring to them."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def render_yaml(bootstrap: Bootstrap, comments: Mapping[str, str] = COMMENTS) -> str:
    """Write *bootstrap* as commented YAML in a stable order.

    Args:
        bootstrap: What to write. Every ``typed_config`` gets its ``@type``.
        comments: Text by place. A place is a few keys of the way down, from the top to the commented key, separated
            by blanks; keys between them may be left out, an item of a list is named by its ``name``. The first place
            in the document that fits gets the comment; places that do not occur are passed over.
    """
    data = bootstrap.to_dict(casing=Casing.SNAKE)
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    lines = text.splitlines()
    pending = {tuple(place.split()): comment for place, comment in comments.items()}
    above: dict[int, list[str]] = {}
    for path, line in _places(yaml.compose(text, Loader=yaml.SafeLoader)):
        for place in [place for place in pending if _fits(place, path)]:
            indent = " " * (len(lines[line]) - len(lines[line].lstrip()))
            above.setdefault(line, []).extend(f"{indent}# {row}" for row in pending.pop(place).splitlines())
    body = (row for number, line in enumerate(lines) for row in (*above.get(number, ()), line))
    return "\n".join([*(f"# {row}".rstrip() for row in HEADER.splitlines()), *body, ""])


def _places(node: yaml.Node | None, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield the way to every key and every named item, with its line counted from 0, from top to bottom."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line
            yield from _places(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            name = _name(item)
            if name is not None:
                yield (*path, name), item.start_mark.line
            yield from _places(item, path if name is None else (*path, name))


def _name(item: yaml.Node) -> str | None:
    if isinstance(item, yaml.MappingNode):
        for key, value in item.value:
            if key.value == "name":
                return str(value.value)
    return None


def _fits(place: Path, path: Path) -> bool:
    rest = iter(path)
    return place[-1] == path[-1] and all(key in rest for key in place)
