"""The metrics pages of several workers as one page. Pure."""

from collections.abc import Mapping
from typing import Final

_COMMENT: Final = "# "


def merge_pages(pages: Mapping[str, str]) -> str:
    """Write the pages of some workers as one, in which each sample has a label ``process`` more.

    Args:
        pages: By the value of the label; in Prometheus' text format, as its own client writes it: every sample below
            the comments of its family.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for worker, page in pages.items():
        label = f'process="{worker}"'
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
