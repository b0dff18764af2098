"""Read runs of an earlier time from the file that they were written to."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run as its file has it."""

    record: Mapping[str, Any]

    @property
    def contender(self) -> str:
        """The contender of the run."""
        return str(self.record["contender"])

    @property
    def seed(self) -> int:
        """The seed of the trace."""
        return int(self.record["seed"])

    def numbers(self) -> dict[str, float]:
        """Return the numbers of a table."""
        kept = {key: value for key, value in self.record.items() if isinstance(value, int | float)}
        return {key: float(value) for key, value in kept.items() if key not in {"seed", "answered"}}

    def as_json(self) -> dict[str, Any]:
        """Return the whole run."""
        return dict(self.record)


def read_runs(path: Path) -> tuple[dict[str, Any], list[RecordedRun]]:
    """Read what a file has about its runs, and the runs."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["about"], [RecordedRun(record) for record in content["runs"]]


def read_to_continue(
    path: Path, options: Mapping[str, Any], contenders: Collection[str], seeds: Collection[int]
) -> list[RecordedRun]:
    """Read the runs to which more seeds are to be added; none if there is no such file.

    Raises:
        ValueError: They have other options, contenders or seeds.
    """
    if not path.exists():
        return []
    about, runs = read_runs(path)
    differing = [key for key, value in options.items() if about["options"].get(key) != value]
    if differing:
        raise ValueError(f"{path} cannot be continued: it was measured with other {', '.join(sorted(differing))}")
    if differing_contenders := set(contenders) ^ {run.contender for run in runs}:
        raise ValueError(f"{path} cannot be continued: it differs in {', '.join(sorted(differing_contenders))}")
    if beyond := {run.seed for run in runs} - set(seeds):
        raise ValueError(f"{path} has seeds that are not asked for ({', '.join(map(str, sorted(beyond)))})")
    return runs
