"""Listening sockets, and a clear error if a port is taken."""

import socket
from pathlib import Path

from dp_extproc.config import Config, ListenSettings, SocketAddress


class StartError(Exception):
    """The service cannot start; the message has the reason and the remedy."""


def check_ports(settings: ListenSettings) -> None:
    """Try every port of the service.

    Raises:
        StartError: Ports are taken; the message names all of them.
    """
    wanted = [(settings.grpc.shifted(worker), "listen.grpc") for worker in range(settings.workers)]
    wanted.append((settings.admin, "listen.admin"))
    if settings.health is not None:
        wanted.append((settings.health, "listen.health"))
    problems: list[str] = []
    for address, key in wanted:
        try:
            listen(address, key).close()
        except StartError as error:
            problems.append(str(error))
    if problems:
        raise StartError("\n".join(problems))


def listen(address: SocketAddress, key: str) -> socket.socket:
    """Listen on a TCP port.

    Raises:
        StartError: The port is taken.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family)
    except OSError:
        raise cannot_listen(address, key) from None


def listen_privately(path: Path) -> socket.socket:
    """Listen on a Unix socket. A socket that an earlier process left there is replaced."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()
    return listening


def cannot_listen(address: SocketAddress, key: str) -> StartError:
    """Make the error for an address that is taken."""
    return StartError(f"cannot listen on {address} ({key}): is another process using the port?")


def owner_address(config: Config) -> str:
    """Return the ``IP:port`` at which Envoy reaches this process.

    Raises:
        StartError: The service listens on a wildcard address and the address of the host is unknown.
    """
    listening = config.listen
    if listening.advertise is not None:
        return str(listening.advertise)
    if not listening.grpc.is_wildcard:
        return str(listening.grpc)
    try:
        # The host name of a container or pod resolves to the address at which others reach it.
        host = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        message = f"this host's address is not known ({error}); set listen.advertise to the IP:port that Envoy reaches"
        raise StartError(message) from None
    return str(SocketAddress(host=host, port=listening.grpc.port))
