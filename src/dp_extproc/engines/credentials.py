"""The API keys that engines ask for, by pool. They are shown to nobody but the engines."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

Headers = tuple[tuple[str, bytes], ...]


class Credentials:
    """The keys that hold at the moment; one instance for everybody who talks to engines."""

    __slots__ = ("_by_pool",)

    def __init__(self, keys: Mapping[str, str] = MappingProxyType({})) -> None:
        """Begin.

        Args:
            keys: By the name of the pool; pools without one are left out.
        """
        self._by_pool: dict[str, Headers] = {}
        self.update(keys)

    def update(self, keys: Mapping[str, str]) -> None:
        """Take other keys from now on."""
        self._by_pool = {pool: (("authorization", f"Bearer {key}".encode()),) for pool, key in keys.items()}

    def headers(self, pool: str) -> Headers:
        """Give the headers of a request to an engine of a pool; none if it asks for no key."""
        return self._by_pool.get(pool, ())

    def __repr__(self) -> str:
        return f"<API keys of {len(self._by_pool)} pools>"


NO_CREDENTIALS: Final = Credentials()
