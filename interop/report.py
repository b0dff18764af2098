"""The tested cases and their results, as a table."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    """One tested case."""

    shape: str
    case: str
    seen: str
    good: bool


@dataclass(slots=True)
class Report:
    """All tested cases; each row is printed as it comes."""

    shape: str = ""
    rows: list[Row] = field(default_factory=list)

    def add(self, case: str, seen: str, *, good: bool) -> None:
        row = Row(self.shape, case, seen, good)
        self.rows.append(row)
        print(f"{'ok  ' if good else 'FAIL'} {row.shape}: {case}: {seen}", flush=True)

    @property
    def is_good(self) -> bool:
        return bool(self.rows) and all(row.good for row in self.rows)

    def table(self) -> str:
        """Write a Markdown table."""
        lines = ["| ranks | case | seen | |", "| --- | --- | --- | --- |"]
        lines += [f"| {row.shape} | {row.case} | {row.seen} | {'ok' if row.good else '**no**'} |" for row in self.rows]
        return "\n".join(lines)
