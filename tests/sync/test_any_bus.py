"""Every replica has exactly the open attempts of its peers once the bus works, whatever happened to messages before."""

from itertools import count
from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dp_extproc.sync import messages
from dp_extproc.sync.messages import Batch, Ended, FirstToken, Placed, PrefillAnswered, Snapshot, decode
from dp_extproc.sync.outbox import HEARTBEAT, Outbox
from dp_extproc.sync.peers import REQUEST_AGAIN_SECONDS, Peers
from sync.peer_requests import PeerRequests, RecordedRequest, record_to

PEER_TIMEOUT = 1e9
"""No peer is gone here."""


class Publishing(RuleBasedStateMachine):
    """One replica publishes to another over a bus that loses, repeats and reorders messages."""

    @initialize(missed=st.booleans())
    def begin(self, missed: bool) -> None:
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(messages, "MAX_EVENT_BYTES", 300)  # so that batches and snapshots of a few are divided
        self.now = 0.0
        self.numbers = count(1)
        self.publisher = Outbox("publisher")
        self.requests = PeerRequests()
        self.receiver = Peers(self.requests.open_peer, PEER_TIMEOUT)
        self.open: dict[int, set[str]] = {}
        """What is true: the events so far of each open attempt."""
        self.after: dict[int, dict[int, set[str]]] = {0: {}}
        """What was true after each batch."""
        self.on_the_way: list[bytes] = []
        if missed:
            self._collect()

    @rule()
    def record(self) -> None:
        number = next(self.numbers)
        self.open[number] = set()
        self.publisher.opened(number, record_to(number), self.now)

    @rule(choice=st.randoms(use_true_random=False), progress=st.sampled_from(["answered", "first token", "ended"]))
    def go_on(self, choice: Random, progress: str) -> None:
        if not self.open:
            return
        number = choice.choice(list(self.open))
        match progress:
            case "answered":
                self.publisher.prefill_answered(number, self.now)
                self.open[number].add(progress)
            case "first token":
                self.publisher.first_token(number, self.now)
                self.open[number].add(progress)
            case "ended":
                self.publisher.ended(number, self.now)
                del self.open[number]

    @rule(seconds=st.sampled_from([0.02, 0.1, HEARTBEAT]), requested=st.booleans())
    def publish(self, seconds: float, requested: bool) -> None:
        self.now += seconds
        if requested:
            self.publisher.send_snapshot()
        self.on_the_way += self._collect()

    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        if not self.on_the_way:
            return
        index = data.draw(st.integers(0, len(self.on_the_way) - 1))
        self._deliver(self.on_the_way[index] if keep else self.on_the_way.pop(index))

    @rule(repeated=st.booleans())
    def deliver_all(self, repeated: bool) -> None:
        for message in self.on_the_way:
            self._deliver(message)
        if not repeated:
            self.on_the_way.clear()

    @rule()
    def lose(self) -> None:
        if self.on_the_way:
            self.on_the_way.pop(0)

    @invariant()
    def attempts_are_those_after_the_last_applied_batch(self) -> None:
        """At any time the receiver has exactly the attempts that were open after the last applied batch."""
        if hasattr(self, "publisher"):
            peer = self.receiver._peers.get("publisher")
            assert self._followed() == self.after[peer.applied if peer else 0]

    def teardown(self) -> None:
        """Compare at the end of every sequence."""
        if hasattr(self, "publisher"):
            try:
                self._settle()
            finally:
                self.patched.undo()

    def _settle(self) -> None:
        """Let the bus work from now on; messages that were on their way may still arrive, before and after."""
        for message in self.on_the_way[::2]:
            self._deliver(message)
        for _ in range(3):
            self.now += max(HEARTBEAT, REQUEST_AGAIN_SECONDS)
            if self.receiver.review(self.now):
                self.publisher.send_snapshot()
            for message in self._collect():
                self._deliver(message)
        for message in self.on_the_way:  # late
            self._deliver(message)

        assert self._followed() == self.open
        assert not any(status.in_doubt for status in self.receiver.status(self.now))

    def _collect(self) -> list[bytes]:
        """Collect messages, and note what was open after each batch."""
        collected = self.publisher.collect(self.now)
        for batch in map(decode, collected):
            if isinstance(batch, Batch):
                truth = {number: set(progress) for number, progress in self.after[batch.sequence - 1].items()}
                for event in batch.events:
                    match event:
                        case Placed():
                            truth[event.attempt] = set()
                        case PrefillAnswered():
                            truth[event.attempt].add("answered")
                        case FirstToken():
                            truth[event.attempt].add("first token")
                        case Ended():
                            del truth[event.attempt]
                self.after[batch.sequence] = truth
        return collected

    def _followed(self) -> dict[int, set[str]]:
        followed = {rank: _progress(entry) for entry in self.requests.open if (rank := entry.record.decode_rank)}
        assert len(followed) == len(self.requests.open)
        return followed

    def _deliver(self, data: bytes) -> None:
        match decode(data):
            case Batch() as batch:
                self.receiver.batch(batch, self.now)
            case Snapshot() as snapshot:
                self.receiver.snapshot(snapshot, self.now)
            case other:
                raise AssertionError(other)


def _progress(entry: RecordedRequest) -> set[str]:
    happened = {"answered": entry.answered_at, "first token": entry.first_byte_at}
    return {name for name, at in happened.items() if at is not None}


TestAnyBus = Publishing.TestCase
