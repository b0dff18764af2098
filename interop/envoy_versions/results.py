"""Reads the report of a test run."""

from pathlib import Path
from xml.etree import ElementTree as ET

from msgspec import Struct


class Results(Struct, frozen=True):
    """How many tests passed, and which failed."""

    passed: int
    skipped: int
    failed: list[str]

    def __str__(self) -> str:
        return f"{self.passed} passed, {len(self.failed)} failed"


def read_results(report: Path) -> Results:
    """Read a report in the format of JUnit, which pytest has written."""
    failed, skipped, passed = [], 0, 0
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - pytest of this run has written it
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Results(passed, skipped, failed)
