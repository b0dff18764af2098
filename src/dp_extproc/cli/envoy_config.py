"""``dp-extproc envoy-config``: print the Envoy configuration that belongs to a configuration file."""

import argparse
import sys
from pathlib import Path

from dp_extproc.config import ConfigError, Protocol, load_config
from dp_extproc.envoy_config import build_bootstrap, render_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="configuration file (YAML)")


def run(args: argparse.Namespace) -> int:
    """Print the bootstrap to stdout. Returns the exit status: 2 if the file cannot be used."""
    try:
        config = load_config(args.config, lambda warning: sys.stderr.write(f"{args.config}: {warning}\n"))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if config.protocol is Protocol.ENDPOINT_PICKER:
        sys.stderr.write(f"{args.config}: protocol: endpoint_picker is for a gateway that configures its own Envoy\n")
        return 2
    sys.stdout.write(render_yaml(build_bootstrap(config)))
    return 0
