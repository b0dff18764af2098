"""Whatever a bus does to messages, once it works again every replica knows exactly what the others have open."""

from itertools import count
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dp_extproc.sync import messages
from dp_extproc.sync.messages import Batch, Dispatched, Ended, FirstToken, PrefillAnswered, Snapshot, decode
from dp_extproc.sync.outbox import HEARTBEAT, Outbox
from dp_extproc.sync.peers import ASK_AGAIN, Peers
from sync.books import Books, Entry, dispatch_to

SILENCE = 1e9
"""Nobody falls silent here; that is another story."""


class Telling(RuleBasedStateMachine):
    """One replica tells another over a bus that delivers what it likes, as often and in what order it likes."""

    @initialize(missed=st.booleans())
    def begin(self, missed: bool) -> None:
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(messages, "MOST_BYTES", 300)  # so that batches and snapshots of a few are divided
        self.now = 0.0
        self.numbers = count(1)
        self.teller = Outbox("teller")
        self.books = Books()
        self.listener = Peers(self.books.open_foreign, SILENCE)
        self.open: dict[int, set[str]] = {}
        """The truth: of each open attempt, what has happened to it."""
        self.after: dict[int, dict[int, set[str]]] = {0: {}}
        """The truth as it was after each batch."""
        self.on_the_way: list[bytes] = []
        if missed:
            self._collect()

    @rule()
    def dispatch(self) -> None:
        number = next(self.numbers)
        self.open[number] = set()
        self.teller.opened(number, dispatch_to(number), self.now)

    @rule(choice=st.randoms(use_true_random=False), progress=st.sampled_from(["answered", "first token", "ended"]))
    def go_on(self, choice: Random, progress: str) -> None:
        if not self.open:
            return
        number = choice.choice(list(self.open))
        match progress:
            case "answered":
                self.teller.prefill_answered(number, self.now)
                self.open[number].add(progress)
            case "first token":
                self.teller.first_token(number, self.now)
                self.open[number].add(progress)
            case "ended":
                self.teller.ended(number, self.now)
                del self.open[number]

    @rule(seconds=st.sampled_from([0.02, 0.1, HEARTBEAT]), answer=st.booleans())
    def tell(self, seconds: float, answer: bool) -> None:
        self.now += seconds
        if answer:
            self.teller.answer()
        self.on_the_way += self._collect()

    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        if not self.on_the_way:
            return
        index = data.draw(st.integers(0, len(self.on_the_way) - 1))
        self._hear(self.on_the_way[index] if keep else self.on_the_way.pop(index))

    @rule(repeated=st.booleans())
    def deliver_all(self, repeated: bool) -> None:
        for message in self.on_the_way:
            self._hear(message)
        if not repeated:
            self.on_the_way.clear()

    @rule()
    def lose(self) -> None:
        if self.on_the_way:
            self.on_the_way.pop(0)

    @invariant()
    def what_is_known_was_true_once(self) -> None:
        """At any time the books show exactly what the teller had open after the last batch that is taken as known."""
        if hasattr(self, "teller"):
            peer = self.listener._peers.get("teller")
            assert self._known() == self.after[peer.applied if peer else 0]

    def teardown(self) -> None:
        """Compare, however it went."""
        if hasattr(self, "teller"):
            try:
                self._settle()
            finally:
                self.patched.undo()

    def _settle(self) -> None:
        """From now on the bus works, but what was on its way may still come, before and after."""
        for message in self.on_the_way[::2]:
            self._hear(message)
        for _ in range(3):
            self.now += max(HEARTBEAT, ASK_AGAIN)
            if self.listener.review(self.now):
                self.teller.answer()
            for message in self._collect():
                self._hear(message)
        for message in self.on_the_way:  # late
            self._hear(message)

        assert self._known() == self.open
        assert not any(status.in_doubt for status in self.listener.status(self.now))

    def _collect(self) -> list[bytes]:
        """Let the teller tell, and note what was open after each batch."""
        collected = self.teller.collect(self.now)
        for batch in map(decode, collected):
            if isinstance(batch, Batch):
                truth = {number: set(progress) for number, progress in self.after[batch.sequence - 1].items()}
                for event in batch.events:
                    match event:
                        case Dispatched():
                            truth[event.attempt] = set()
                        case PrefillAnswered():
                            truth[event.attempt].add("answered")
                        case FirstToken():
                            truth[event.attempt].add("first token")
                        case Ended():
                            del truth[event.attempt]
                self.after[batch.sequence] = truth
        return collected

    def _known(self) -> dict[int, set[str]]:
        known = {rank: _progress(entry) for entry in self.books.open if (rank := entry.dispatch.decode_rank)}
        assert len(known) == len(self.books.open)
        return known

    def _hear(self, data: bytes) -> None:
        match decode(data):
            case Batch() as batch:
                self.listener.batch(batch, self.now)
            case Snapshot() as snapshot:
                self.listener.snapshot(snapshot, self.now)
            case other:
                raise AssertionError(other)


def _progress(entry: Entry) -> set[str]:
    happened = {"answered": entry.answered_at, "first token": entry.first_byte_at}
    return {name for name, at in happened.items() if at is not None}


TestAnyBus = Telling.TestCase
