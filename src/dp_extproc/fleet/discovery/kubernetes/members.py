"""Makes the members of one slice or pod. Their ports and their revision group are the same. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from dp_extproc.config.discovery import MemberState
from dp_extproc.engines.model import in_url
from dp_extproc.fleet.discovery.kubernetes.labels import BOOTSTRAP, bootstrap_port_of, group_of
from dp_extproc.fleet.discovery.kubernetes.objects import Meta
from dp_extproc.fleet.discovery.source import Member

_HTTP: Final = "http"
"""Name of the port that is taken if none is configured."""

DeclaredPort = tuple[str | None, int | None, str | None]
"""Name, number and protocol of a port."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all members of one object share."""

    port: int
    bootstrap_port: int | None
    group: str | None

    def member(self, address: str, *, state: MemberState, uid: str, name: str) -> Member:
        """Make a member.

        Raises:
            ValueError: The address is no IP address.
        """
        ip_address(address)
        return Member(
            url=f"http://{in_url(address)}:{self.port}",
            host=address,
            port=self.port,
            state=state,
            uid=uid,
            name=name,
            group=self.group,
            bootstrap_port=self.bootstrap_port,
        )


def read_shared(meta: Meta, ports: Iterable[DeclaredPort], port: int | str | None, group_label: str | None) -> Shared:
    """Find the ports and the group of an object.

    Args:
        meta: Metadata of the object.
        ports: The ports that it declares.
        port: Number or name of the port, as configured.
        group_label: Label or annotation with the revision group, as configured.

    Raises:
        ValueError: There is no such port, or a label has no valid value; the message ends with what to write.
    """
    declared = _by_name(ports)
    number = _pick(declared, port)
    if not 1 <= number <= 65535:
        raise ValueError(f"{number} is no port")
    return Shared(number, bootstrap_port_of(meta, declared), group_of(meta, group_label))


def _by_name(ports: Iterable[DeclaredPort]) -> dict[str, int]:
    """Map names of TCP ports to their numbers. A port without a name, or with a repeated one, goes by its number."""
    found: dict[str, int] = {}
    for name, number, protocol in ports:
        if number is not None and protocol in {None, "", "TCP"}:
            found[name if name and name not in found else f"{number}"] = number
    return found


def _pick(ports: dict[str, int], wanted: int | str | None) -> int:
    """Pick the port of an engine.

    A configured number counts whatever is declared. Without a configured port that is the port named ``http``, or else
    the only one beside the bootstrap port; the order of ports never counts.
    """
    if isinstance(wanted, int):
        return wanted
    named = _HTTP if wanted is None else wanted
    if named in ports:
        return ports[named]
    others = [number for name, number in ports.items() if name != BOOTSTRAP]
    if wanted is None and len(others) == 1:
        return others[0]
    names = ", ".join(sorted(ports)) or "none"
    raise ValueError(f"no port is named {named} (there are: {names}); write port: NAME or port: NUMBER")
