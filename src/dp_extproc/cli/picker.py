"""``dp-extproc picker``: serve as the endpoint picker of an InferencePool, with the flags of the reference picker.

Charts start a picker with these flags. Everything else is in a file for ``serve``.
"""

import argparse
import os
from functools import partial
from typing import Any, Final

from dp_extproc.cli import serve, start
from dp_extproc.config.picker_flags import IGNORED, READ, configure_picker

_MAY_STAND_ALONE: Final[dict[str, Any]] = {"nargs": "?", "const": "true"}
"""As in Go, a switch without a value stands for true."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, what in READ.items():
        more = _MAY_STAND_ALONE if name == "secure-serving" else {}
        parser.add_argument(f"--{name}", metavar="VALUE", help=what, **more)
    for name in sorted(IGNORED):
        short = ["-v"] if name == "v" else []
        parser.add_argument(*short, f"--{name}", help=argparse.SUPPRESS, **_MAY_STAND_ALONE)
    parser.add_argument("--model", nargs="+", default=["*"], metavar="NAME", help="models that are served (any)")
    serve.add_log_level(parser)
    parser.set_defaults(worker_context=None)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; the exit status is that of ``serve``."""
    return serve.run(args, partial(_load, namespace=os.environ.get("NAMESPACE", "")))


def _load(args: argparse.Namespace, warn: start.WarnLine, namespace: str) -> start.Start:
    given = {name: value for name, value in vars(args).items() if isinstance(value, str)}
    flags = {name: given[key] for name in READ if (key := name.replace("-", "_")) in given}
    source = configure_picker(flags, tuple(args.model), namespace)
    ignored = ", ".join(f"--{name}" for name in sorted(IGNORED) if name.replace("-", "_") in given)
    if ignored:
        warn(f"without a meaning here: {ignored}")
    return start.of_source(source, None, warn)
