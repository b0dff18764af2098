"""Names of the clusters, and the addresses at which Envoy reaches the processes of the service."""

import ipaddress
from typing import Final

from dp_extproc.config import Config

DISPATCH: Final = "dp_dispatch"
PREFILL_LEG: Final = "prefill_leg"
SERVICE: Final = "extproc"
SERVICE_OWNER: Final = "extproc_owner"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
"""Also the name of a listener, if truncated streams end with an error event."""
DECODE_SERVER: Final = "decode_server"


def is_named(config: Config) -> bool:
    """Return whether Envoy finds the service by a DNS name, which may resolve to several addresses."""
    return any(not _is_ip(host) for host, _ in services_of(config))


def may_be_several(config: Config) -> bool:
    """Return whether the service may have several processes, so that Envoy can turn to another one."""
    return config.listen.workers > 1 or bool(config.envoy.standby) or is_named(config)


def services_of(config: Config) -> list[tuple[str, int]]:
    """Return host and port of each service, in order of priority; of several worker processes those of the first."""
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
