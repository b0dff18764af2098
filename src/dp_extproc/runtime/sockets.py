"""Listening sockets, and a clear word when somebody else has the port."""

import socket
from pathlib import Path

from dp_extproc.config import Config, ListenSettings, SocketAddress


class StartError(Exception):
    """The service cannot start; the message says why and what to do."""


def check_ports(settings: ListenSettings) -> None:
    """Try every port that the service is going to listen on.

    Raises:
        StartError: Some cannot be listened on; the message names all of them.
    """
    wanted = [(settings.grpc.shifted(worker), "listen.grpc") for worker in range(settings.workers)]
    wanted.append((settings.admin, "listen.admin"))
    refused: list[str] = []
    for address, key in wanted:
        try:
            listen(address, key).close()
        except StartError as error:
            refused.append(str(error))
    if refused:
        raise StartError("\n".join(refused))


def listen(address: SocketAddress, key: str) -> socket.socket:
    """Listen on a TCP port.

    Raises:
        StartError: It is not to be had.
    """
    try:
        return socket.create_server(
            (address.host, address.port), family=socket.AF_INET6 if ":" in address.host else socket.AF_INET
        )
    except OSError:
        raise cannot_listen(address, key) from None


def listen_privately(path: Path) -> socket.socket:
    """Listen on a Unix socket, in place of one that a process may have left there."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()
    return listening


def cannot_listen(address: SocketAddress, key: str) -> StartError:
    """Make the word."""
    return StartError(f"cannot listen on {address} ({key}): is another process using the port?")


def owner_address(config: Config) -> str:
    """Give the ``IP:port`` under which Envoy reaches this very process.

    Raises:
        StartError: The service listens on a wildcard address and this host's own address is not known.
    """
    listening = config.listen
    if listening.advertise is not None:
        return str(listening.advertise)
    if not listening.grpc.is_wildcard:
        return str(listening.grpc)
    try:
        # In a container or a pod the host name resolves to the address that others reach it by.
        host = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        message = f"this host's address is not known ({error}); set listen.advertise to the IP:port that Envoy reaches"
        raise StartError(message) from None
    return str(SocketAddress(host=host, port=listening.grpc.port))
