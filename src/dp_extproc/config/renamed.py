"""Old names of keys and values, which are read until 1.0.

The names are replaced in the YAML nodes, before anything is checked. So a problem has the line of the old name, merge
keys (``<<``) behave as if the file had the new names, and all other code sees one name for one thing.
"""

from collections.abc import Iterator
from typing import Final

import yaml

from dp_extproc.config.problems import Key, Problem, spell

KEYS: Final = {
    "health": "outlier_detection",
    "outlier_detection.failures": "consecutive_failures",
    "outlier_detection.ejection": "base_ejection_time",
    "outlier_detection.max_ejection": "max_ejection_time",
    "envoy.headers_timeout": "request_headers_timeout",
    "envoy.upload_timeout": "request_timeout",
    "envoy.cut_streams": "truncated_streams",
    "pools.carrier": "routing_fields",
    "admission.max_fill": "max_token_ratio",
    "admission.max_load": "max_request_ratio",
    "load.prefill_step_tokens": "prefill_step_cost_tokens",
    "load.decode_request_tokens": "decode_request_cost_tokens",
    "sync.silence": "peer_timeout",
}
"""New name of each renamed key, by its place: sections by their new names, lists without an index."""
VALUES: Final = {
    "protocol": {"own": "envoy"},
    "supervision": {"answers": "first_event"},
    "supervision.mode": {"answers": "first_event"},
    "envoy.body_mode": {"duplex": "full_duplex_streamed"},
    "envoy.truncated_streams": {"cut": "reset", "event": "error_event"},
}
"""New name of each renamed value, by the new name of its key."""

_MERGE: Final = "tag:yaml.org,2002:merge"


def rename(root: yaml.Node | None) -> tuple[list[Problem], list[Problem]]:
    """Replace old names in place.

    Returns:
        A warning for each old name, and an error for each old name whose new name stands in the same mapping.
    """
    warnings: list[Problem] = []
    errors: list[Problem] = []
    for mapping, index, path, at in list(_entries(root, "", (), set())):
        key, value = mapping.value[index]
        name = path.rpartition(".")[2]
        old: str = value.value if isinstance(value, yaml.ScalarNode) else ""
        text: str = VALUES.get(path, {}).get(old, old)
        if name == key.value and text == old:
            continue
        if name != key.value and name in [other.value for other, _ in mapping.value]:
            found, message = errors, f"is the old name of {name}, which stands here, too; keep {name} alone"
        else:
            new = name if text == old else f"{name}: {text}"
            found, message = warnings, f"was renamed; write {new} (the old name is read until version 1.0)"
        found.append(Problem(key.start_mark.line + 1, spell((*at, key.value)), message))
        mapping.value[index] = (_scalar(key, name), value if text == old else _scalar(value, text))
    return warnings, errors


def _entries(
    node: yaml.Node | None, path: str, at: Key, visited: set[yaml.Node]
) -> Iterator[tuple[yaml.MappingNode, int, str, Key]]:
    """Find every entry of every mapping: the mapping, the index, the path with new names, the place of the mapping."""
    if node is None or node in visited:  # an alias leads to a node that was visited, or even to a parent
        return
    visited.add(node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _entries(item, path, (*at, index), visited)
    elif isinstance(node, yaml.MappingNode):
        for index, (key, value) in enumerate(node.value):
            if key.tag == _MERGE:
                yield from _entries(value, path, at, visited)
            elif isinstance(key, yaml.ScalarNode) and "." not in key.value:  # no known key has a dot
                written = f"{path}.{key.value}".lstrip(".")
                new = f"{path}.{KEYS.get(written, key.value)}".lstrip(".")
                yield node, index, new, at
                yield from _entries(value, new, (*at, key.value), visited)


def _scalar(node: yaml.ScalarNode, text: str) -> yaml.ScalarNode:
    """Copy *node* with another text; aliases of it keep their own."""
    return yaml.ScalarNode(node.tag, text, node.start_mark, node.end_mark, node.style)
