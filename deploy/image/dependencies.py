"""Print the requirements of pyproject.toml, one per line, or those of an extra.

    python3 dependencies.py [EXTRA]

pip installs dependencies only together with the project, so every change of it would install all of them again.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extra: str | None) -> list[str]:
    """Read the requirements of the project, or of one of its extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    found: list[str] = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(Path("pyproject.toml"), sys.argv[1] if sys.argv[1:] else None)) + "\n")
