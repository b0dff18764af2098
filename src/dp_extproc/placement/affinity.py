"""Stub by the lead: names that placement uses. The prefix helper replaces this file."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from dp_extproc.request.prefix import Prefix

_S = TypeVar("_S", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Held(Generic[_S]):
    """Which tokens of a prompt are held."""

    by_slot: Mapping[_S, float]
    elsewhere: float


class PrefixIndex(Generic[_S]):
    """Who holds what."""

    def held(self, prefix: Prefix, tokens: float, session: str | None = None) -> Held[_S]:
        return Held({}, 0.0)

    def note(self, slot: _S, prefix: Prefix, tokens: float, capacity_tokens: float | None) -> None: ...
    def note_session(self, session: str, slot: _S, tokens: float) -> None: ...
    def forget(self, slot: _S) -> None: ...
