"""Changes of the set of endpoints, whatever reports them. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from dp_extproc.engines.model import Endpoint


@dataclass(frozen=True, slots=True)
class Membership:
    """One change of the set of endpoints. Their URLs identify them."""

    added: tuple[Endpoint, ...] = ()
    updated: tuple[Endpoint, ...] = ()
    """Endpoints that stay and whose settings change, as they are from now on."""
    removed: tuple[Endpoint, ...] = ()


def membership(before: Iterable[Endpoint], after: Iterable[Endpoint]) -> Membership:
    """Compute the change between two sets of endpoints."""
    old, new = ({each.url: each for each in some} for some in (before, after))
    return Membership(
        added=tuple(each for url, each in new.items() if url not in old),
        updated=tuple(each for url, each in new.items() if url in old and old[url] != each),
        removed=tuple(each for url, each in old.items() if url not in new),
    )
