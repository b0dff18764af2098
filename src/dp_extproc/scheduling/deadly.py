"""Remembers requests that end the engines which compute them, so that no further engine gets them.

An engine may end by its own fault, by its operator's, or by the machine's. So one lost engine proves nothing, and a
request is *deadly* only if all of this holds:

1. It was lost with two engines: each had accepted it, and dropped its connection.
2. Both engines have died: soon after the loss they refused connections. A network that was cut refuses none, and an
   engine that goes on to report its load has not died. An engine that was to stop had reported to be not ready.
3. Both were down at the same time. Rolling restarts wait for an engine before they end the next one.
4. No other request was lost with both. Of several requests, those that go on to lose engines are separated by the next
   loss: a request that was lost before is placed where no other such request was placed just now, as far as possible.

While rule 2 is not decided yet, the request is refused for now. Replicas publish the losses to each other, and each
observes by itself which engines refuse connections.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import combinations
from typing import Final

from msgspec import Struct

from dp_extproc.request.rejection import TRY_AGAIN, Reason, Rejection

KEPT_SECONDS: Final = 600.0
"""Seconds for which a loss is remembered, and so for which a deadly request is refused: longer than clients retry."""
MOST_REQUESTS: Final = 1000
"""Bounds the requests that are remembered; the oldest are forgotten."""
APART_SECONDS: Final = 5.0
"""Seconds after the placement of a request that was lost before, in which no other such request follows it."""


class Verdict(Enum):
    """What is known of a request."""

    FREE = auto()
    CHECKING = auto()
    """It was lost with two engines, and whether both have died is not known yet."""
    DEADLY = auto()


_REFUSALS: Final = {
    Verdict.CHECKING: Rejection(
        503,
        Reason.ENGINES_LOST,
        "two servers were lost while they computed this request; whether it has ended them is being checked; try again",
        headers=TRY_AGAIN,
    ),
    # No client library repeats a 422. It blames the content of a request, where a 400 blames its form.
    Verdict.DEADLY: Rejection(
        422,
        Reason.DEADLY_REQUEST,
        f"two servers have died while they computed this request, so it is refused for {KEPT_SECONDS / 60:g} minutes; "
        "change it: token ids outside of the model's vocabulary are one cause",
    ),
}


class DeadlyRequest(Struct, frozen=True):
    """A request that was found to be deadly."""

    fingerprint: str
    addresses: tuple[str, ...]
    """``IP:port`` of the engines that have died."""
    body_bytes: int
    """The length of its body."""


@dataclass(slots=True, eq=False)
class _Loss:
    """One engine that a request was lost with."""

    address: str
    at: float
    has_died: bool = False
    back_at: float = math.inf
    """When the engine reported its load again."""

    def overlaps(self, other: "_Loss") -> bool:
        """Return whether both engines were down at the same time."""
        return max(self.at, other.at) < min(self.back_at, other.back_at)


def _ignore(*_: object) -> None:
    """Ignore what nothing depends on."""


class DeadlyRequests:
    """The requests that were lost with engines, and what became of the engines."""

    def __init__(
        self,
        found: Callable[[DeadlyRequest], object] = _ignore,
        publish: Callable[[str, str, float], object] = _ignore,
        *,
        check_seconds: float = 5.0,
    ) -> None:
        """Begin without losses.

        Args:
            found: Called when a request is found to be deadly, once by each replica.
            publish: Called with the fingerprint and the address of each loss of this replica, and with its time.
            check_seconds: Seconds after a loss in which the death of an engine has to show.
        """
        self._found = found
        self._publish = publish
        self.check_seconds = check_seconds
        self._losses: OrderedDict[str, list[_Loss]] = OrderedDict()
        """The losses of each request, by its fingerprint."""
        self._down: set[str] = set()
        """The addresses of losses whose engine was not seen alive since."""
        self._reported: set[str] = set()
        self._placed: dict[str, tuple[str, float]] = {}
        """The request that was lost before and was placed last on each address, and when."""

    def __len__(self) -> int:
        """Return the number of requests that are remembered."""
        return len(self._losses)

    def lost(self, fingerprint: str, address: str, now: float) -> None:
        """Note that the engine at an address has dropped a request of this replica that it had accepted."""
        if fingerprint and self.heed(fingerprint, address, now):
            self._publish(fingerprint, address, now)

    def heed(self, fingerprint: str, address: str, at: float) -> bool:
        """Note a loss of any replica, and return whether it was unknown."""
        losses = self._losses.setdefault(fingerprint, [])
        if any(loss.address == address and at < loss.back_at for loss in losses):
            return False
        losses.append(_Loss(address, at))
        self._down.add(address)
        self._losses.move_to_end(fingerprint)
        self._forget(at)
        return True

    def alive(self, address: str, since: float) -> None:
        """Note that an engine has answered a request of *since*: it lives, or another one has taken its place."""
        if address not in self._down:
            return
        for fingerprint, losses in list(self._losses.items()):
            for loss in [each for each in losses if each.address == address and each.at < since]:
                if not loss.has_died:
                    losses.remove(loss)
                elif loss.back_at == math.inf:
                    loss.back_at = since
            if not losses:
                del self._losses[fingerprint]
        if not any(loss.at >= since for losses in self._losses.values() for loss in losses if loss.address == address):
            self._down.discard(address)

    def refused(self, address: str, now: float) -> None:
        """Note that nothing listens at an address."""
        if address not in self._down:
            return
        for losses in self._losses.values():
            for loss in losses:
                if loss.address == address and now - loss.at < self.check_seconds:
                    loss.has_died = True

    def placed(self, fingerprint: str, addresses: Iterable[str], now: float) -> None:
        """Note where a request was placed, if it was lost before."""
        if self._losses.get(fingerprint):
            self._placed.update(dict.fromkeys(addresses, (fingerprint, now)))

    def occupied(self, fingerprint: str, now: float) -> frozenset[str]:
        """Return the addresses that a request is to avoid, because others that were lost before are there."""
        if not self._losses.get(fingerprint):
            return frozenset()
        return frozenset(
            address
            for address, (other, at) in self._placed.items()
            if other != fingerprint and now - at < APART_SECONDS
        )

    def refuse(self, fingerprint: str, now: float, body_bytes: int) -> Rejection | None:
        """Refuse a request that is deadly, or may be."""
        verdict = self.judge(fingerprint, now, body_bytes)
        return _REFUSALS.get(verdict)

    def judge(self, fingerprint: str, now: float, body_bytes: int = 0) -> Verdict:
        """Return what is known of a request."""
        verdict = Verdict.FREE
        for one, other in self._pairs(fingerprint, now):
            if not (one.has_died and other.has_died):
                verdict = Verdict.CHECKING
            elif not self._is_shared(fingerprint, one, other):
                if fingerprint not in self._reported:
                    self._reported.add(fingerprint)
                    self._found(DeadlyRequest(fingerprint, (one.address, other.address), body_bytes))
                return Verdict.DEADLY
        return verdict

    def _pairs(self, fingerprint: str, now: float) -> Iterator[tuple[_Loss, _Loss]]:
        """Yield the engines that a request was lost with, two by two, where both were down at the same time."""
        valid = [
            loss
            for loss in self._losses.get(fingerprint, ())
            if now - loss.at < (KEPT_SECONDS if loss.has_died else self.check_seconds)
        ]
        for one, other in combinations(valid, 2):
            if one.address != other.address and one.overlaps(other):
                yield one, other

    def _is_shared(self, fingerprint: str, one: _Loss, other: _Loss) -> bool:
        """Return whether another request was lost with both engines."""
        return any(
            all(any(each.address == loss.address and each.overlaps(loss) for each in losses) for loss in (one, other))
            for another, losses in self._losses.items()
            if another != fingerprint
        )

    def _forget(self, now: float) -> None:
        """Forget the requests whose last loss is too old, and the oldest ones if there are too many."""
        while self._losses:
            oldest, losses = next(iter(self._losses.items()))
            if len(self._losses) <= MOST_REQUESTS and now - losses[-1].at < KEPT_SECONDS:
                break
            del self._losses[oldest]
        self._reported &= self._losses.keys()
        self._down &= {loss.address for losses in self._losses.values() for loss in losses}
        self._placed = {address: each for address, each in self._placed.items() if now - each[1] < APART_SECONDS}
