"""``dp-extproc init``: write a configuration file with every key, to begin with."""

import argparse
import sys
from pathlib import Path

from dp_extproc.config.template import template


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="new file; without it the text is printed")


def run(args: argparse.Namespace) -> int:
    """Write or print. Returns the exit status: 1 if the file exists already or cannot be written."""
    path: Path | None = args.file
    if path is None:
        sys.stdout.write(template())
        return 0
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError:
        sys.stderr.write(f"{path} exists, and stays as it is; name another file, or remove this one\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{path} cannot be written: {error.strerror}\n")
        return 1
    sys.stderr.write(f"{path} is written; put the engines into it, then run: dp-extproc check -c {path}\n")
    return 0
