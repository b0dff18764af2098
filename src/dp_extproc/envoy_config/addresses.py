"""Names of the clusters, and where the service is to be found, which may be more than one process."""

import ipaddress
from typing import Final

from dp_extproc.config import Config

DISPATCH: Final = "dp_dispatch"
PREFILL_LEG: Final = "prefill_leg"
SERVICE: Final = "extproc"
SERVICE_OWNER: Final = "extproc_owner"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
"""Also the listener of this name, where streams are to end with an event."""
DECODE_SERVER: Final = "decode_server"


def is_named(config: Config) -> bool:
    """Tell whether the service is found by a name, which may stand for several."""
    return any(not _is_ip(host) for host, _ in services_of(config))


def may_be_several(config: Config) -> bool:
    """Tell whether there may be a process to turn to when another one has gone."""
    return config.listen.workers > 1 or bool(config.envoy.standby) or is_named(config)


def services_of(config: Config) -> list[tuple[str, int]]:
    """Give host and port of each service, or of its first worker, in the order in which they decide."""
    return [_service_address(config), *map(_split, config.envoy.standby)]


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _service_address(config: Config) -> tuple[str, int]:
    if config.envoy.service is not None:
        return _split(config.envoy.service)
    listen = config.listen.grpc
    if listen.is_wildcard:
        return ("::1" if ":" in listen.host else "127.0.0.1"), listen.port
    return listen.host, listen.port
