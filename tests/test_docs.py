"""Every relative link of every Markdown page leads to a file or a heading, and every metric is described."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    {
        Path(name)
        for name in subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()
        if (ROOT / name).is_file()
    }
)  # fmt: skip
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`]*`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def text_of(page: Path) -> str:
    """Read a page without its code blocks."""
    return _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """Name the anchors of a page by the rule of GitHub: lower case, hyphens for blanks, no punctuation."""
    found: set[str] = set()
    for heading in _HEADING.findall(text_of(page)):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = next(number for number in range(len(found) + 1) if _numbered(anchor, number) not in found)
        found.add(_numbered(anchor, number))
    return found


def _numbered(anchor: str, number: int) -> str:
    return f"{anchor}-{number}" if number else anchor


def test_pages_are_found_without_exception() -> None:
    """An empty list would pass every other test of this file."""
    assert {Path("README.md"), Path("CHANGELOG.md"), Path("docs/glossary.md")} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_of_a_page_resolve(page: Path) -> None:
    """A link to a moved file or a renamed heading fails silently in a browser."""
    broken = []
    for link in _LINK.findall(_CODE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page.parent / name).resolve() if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target.relative_to(ROOT))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == Path("docs")], ids=str)
def test_pages_of_the_documentation_are_linked_from_the_readme(page: Path) -> None:
    """A page that no reader finds is not maintained either."""
    assert f"]({page})" in text_of(Path("README.md"))


def test_metrics_are_described_on_the_page_of_operations() -> None:
    """A metric without a description is no help to the one who sees it, and a described one that is gone misleads."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/dp_extproc").rglob("*.py"))
    exported = set(re.findall(r'"(dp_extproc_[a-z_]+[a-z])"', source))
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    described = {re.sub("_(total|info)$", "", name) for name in re.findall(r"dp_extproc_[a-z_]+[a-z]", page)}
    assert len(exported) > 30
    assert described == exported
