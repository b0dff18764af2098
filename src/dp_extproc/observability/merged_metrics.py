"""Merges the metrics pages of several worker processes into one. Pure."""

from collections.abc import Mapping
from typing import Final

_COMMENT: Final = "# "


def merge_pages(pages: Mapping[str, str]) -> str:
    """Merge pages, and add the label ``process`` to each sample.

    Args:
        pages: Pages by the value of the label, in the text format of the Prometheus client. That format puts the
            samples of a family below its comments.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for process, page in pages.items():
        label = f'process="{process}"'
        family = ""
        for line in page.splitlines():
            if line.startswith(_COMMENT):
                family = line.split(" ", 3)[2]
                known = comments.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, label))
    return "".join(f"{line}\n" for family, above in comments.items() for line in (*above, *samples.get(family, ())))


def _labelled(sample: str, label: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
