"""``dp-extproc envoy-config``: print the Envoy configuration that belongs to a configuration of the service."""

import argparse
import sys

from dp_extproc.cli import start
from dp_extproc.config import ConfigError, Protocol
from dp_extproc.envoy_config import build_bootstrap, render_yaml

add_arguments = start.add_arguments


def run(args: argparse.Namespace) -> int:
    """Print the bootstrap to stdout. Returns the exit status: 2 if the configuration cannot be used."""
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
    sys.stdout.write(render_yaml(build_bootstrap(config)))
    return 0
