"""The API keys of engines, by pool. They are sent to engines and appear nowhere else."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

Headers = tuple[tuple[str, bytes], ...]


class Credentials:
    """The keys in use at present, by the name of the pool, without the pools that need none.

    One instance serves every sender of requests to engines.
    """

    __slots__ = ("_by_pool",)

    def __init__(self, keys: Mapping[str, str] = MappingProxyType({})) -> None:
        self._by_pool: dict[str, Headers] = {}
        self.update(keys)

    def update(self, keys: Mapping[str, str]) -> None:
        self._by_pool = {pool: (("authorization", f"Bearer {key}".encode()),) for pool, key in keys.items()}

    def headers(self, pool: str) -> Headers:
        """Return the headers of a request to an engine of a pool; none if the pool has no key."""
        return self._by_pool.get(pool, ())

    def __repr__(self) -> str:
        return f"<API keys of {len(self._by_pool)} pools>"


NO_CREDENTIALS: Final = Credentials()
"""For fleets without keys. It is never updated."""
