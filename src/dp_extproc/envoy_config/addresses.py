"""The addresses at which Envoy reaches the processes of the service."""

import ipaddress

from dp_extproc.config import Config


def has_dns_name(config: Config) -> bool:
    """Return whether Envoy resolves a DNS name to find the service. There may be several addresses then."""
    return any(not is_ip(host) for host, _ in services_of(config))


def may_be_several(config: Config) -> bool:
    """Return whether the service may have several processes, so that Envoy can turn to another one."""
    return config.listen.workers > 1 or bool(config.envoy.standby) or has_dns_name(config)


def services_of(config: Config) -> list[tuple[str, int]]:
    """Return host and port of the service and its standbys, in order. They are those of the first worker process."""
    return [_service_address(config), *map(host_and_port, config.envoy.standby)]


def _service_address(config: Config) -> tuple[str, int]:
    if config.envoy.service is not None:
        return host_and_port(config.envoy.service)
    listen = config.listen.grpc
    if listen.is_wildcard:
        return ("::1" if ":" in listen.host else "127.0.0.1"), listen.port
    return listen.host, listen.port


def host_and_port(address: str) -> tuple[str, int]:
    """Split the ``host:port`` of a program."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_ip(host: str) -> bool:
    """Return whether it is an address, and no DNS name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
