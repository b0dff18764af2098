"""What all files of certificates and keys have in common, whoever uses them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dp_extproc.config import Problem

Signature = tuple[tuple[int, int, int], ...]


def unreadable(section: str, files: Mapping[str, str]) -> Iterator[Problem]:
    """Find the files of a section that cannot be read, by their keys there."""
    for key, path in files.items():
        try:
            Path(path).read_bytes()
        except OSError as error:
            yield Problem(None, f"{section}.{key}", f"{path} cannot be read: {error.strerror or type(error).__name__}")


def file_signature(paths: Iterable[str]) -> Signature:
    """Return a value that changes with the files. It follows links, because Kubernetes replaces their targets.

    Raises:
        OSError: A file is missing.
    """
    stats = [Path(path).stat() for path in paths]
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
