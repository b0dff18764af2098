"""Which processes belong to a session: all that its leader has started, whoever their parents are by now."""

from pathlib import Path


def processes_of(leader: int) -> set[int]:
    """Find the processes of a session that have not ended, its leader among them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found
