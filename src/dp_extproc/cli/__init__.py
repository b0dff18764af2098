"""The command line: one module per command."""

from dp_extproc.cli.main import main

__all__ = ["main"]
