"""Looks up a name as every program here does: ``/etc/hosts``, name service switch, DNS with search domains."""

import socket
from typing import Final

from dp_extproc.fleet.discovery.answers import Address, Answer

_ABSENT: Final = frozenset({socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_ADDRFAMILY})
"""Codes of a look-up that has worked, of a name that has no address. All others are failures (``gai_strerror``)."""


def look_up_by_system(name: str, port: int) -> Answer:
    """Look up the addresses of a name by ``getaddrinfo``, which gives no TTL and no SRV records.

    It blocks, and raises OSError or UnicodeError.
    """
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in _ABSENT:
            return Answer()
        raise
    # Of two families each engine would be there twice.
    families = {family for family, *_ in found}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return Answer(tuple(Address(str(each[4][0]), port) for each in found if each[0] == family))
