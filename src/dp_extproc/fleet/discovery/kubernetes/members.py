"""Makes a member of an address and a port. Pure."""

from ipaddress import ip_address

from dp_extproc.engines.model import in_url
from dp_extproc.fleet.discovery.source import Member, MemberState


def member_at(
    address: str,
    port: int,
    *,
    state: MemberState,
    uid: str,
    name: str,
    group: str | None,
    bootstrap_port: int | None,
) -> Member:
    """Make a member.

    Raises:
        ValueError: The address is no IP address, or the port is none.
    """
    ip_address(address)
    if not 1 <= port <= 65535:
        raise ValueError(f"{port} is no port")
    return Member(
        url=f"http://{in_url(address)}:{port}",
        host=address,
        port=port,
        state=state,
        uid=uid,
        name=name,
        group=group,
        bootstrap_port=bootstrap_port,
    )
