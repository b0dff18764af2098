"""``dp-extproc schema``: print a JSON Schema of the configuration file, for editors."""

import argparse
import json
import sys

from dp_extproc.config.json_schema import json_schema


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """Add no options: there is one schema."""


def run(_args: argparse.Namespace) -> int:
    """Print the schema. Returns the exit status, which is always 0."""
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    return 0
