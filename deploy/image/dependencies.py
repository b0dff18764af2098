"""Print what pyproject.toml asks for, one requirement a line; those of an extra if one is named.

    python3 dependencies.py [EXTRA]

pip installs dependencies only together with the project itself, whose every change would then install them all anew.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extra: str | None) -> list[str]:
    """Read them."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    found: list[str] = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path("pyproject.toml"), sys.argv[1] if sys.argv[1:] else None)) + "\n")
