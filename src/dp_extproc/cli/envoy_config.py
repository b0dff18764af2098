"""``dp-extproc envoy-config``: print the Envoy configuration that belongs to a configuration of the service."""

import argparse
import sys
from pathlib import Path

from pydantic import ValidationError

from dp_extproc.cli import start
from dp_extproc.config import ConfigError, EnvoySettings, Protocol
from dp_extproc.envoy_config import FORMS, secret_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    start.add_arguments(parser)
    parser.add_argument(
        "--format", choices=FORMS, default="bootstrap", help="form of the configuration (%(default)s); see docs/mesh.md"
    )
    parser.add_argument(
        "--name-prefix", metavar="TEXT", help="beginning of all names of clusters and listeners (envoy.name_prefix)"
    )
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="write files into this directory")


def run(args: argparse.Namespace) -> int:
    """Print the configuration to stdout, or write its files.

    Returns:
        The exit status: 2 if the configuration cannot be used, 1 if a file cannot be written.
    """
    try:
        started = start.load(args, lambda line: sys.stderr.write(f"{line}\n"))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if started.config.protocol is Protocol.ENDPOINT_PICKER:
        sys.stderr.write(
            f"{started.source.name}: protocol: endpoint_picker is for a gateway that configures its own Envoy\n"
        )
        return 2
    config = started.config.model_copy(update={"listen": started.listen})
    if args.name_prefix is not None:
        try:
            envoy = EnvoySettings.model_validate({**dict(config.envoy), "name_prefix": args.name_prefix})
        except ValidationError as error:
            sys.stderr.write(f"--name-prefix {args.name_prefix}: {error.errors()[0]['msg']}\n")
            return 2
        config = config.model_copy(update={"envoy": envoy})
    files = {**FORMS[args.format](config), **secret_files(config)}
    if args.output is None:
        for number, (name, text) in enumerate(files.items()):
            sys.stdout.write(text if len(files) == 1 else f"{'---' if number else ''}\n# {name}\n{text}")
        return 0
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (args.output / name).write_text(text, encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"{args.output}: {error.strerror}\n")
        return 1
    return 0
