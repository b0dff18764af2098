"""Do prefill's half of the rendezvous: rooms in which a decode leg names the destination of a KV cache.

All state of a room is keyed by rank and number alone, as SGLang's is (``disaggregation/common/conn.py``). So two live
requests with one room share it: the second destination replaces the first, whose owner waits in vain, and the first
prefill leg that is done takes the room away from the other.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dp_extproc.lab.engine.bootstrap_fields import metadata_buffers
from dp_extproc.lab.engine.controller import conflict
from dp_extproc.lab.engine.leg import Failure, Finished
from dp_extproc.lab.engine.rendezvous import FAKE_HOST, TAKEN_AWAY, failure, room_of
from dp_extproc.lab.engine.scheduler.work import Stage
from dp_extproc.lab.engine.settings import Settings
from dp_extproc.lab.engine.ticket import Ticket


@dataclass(slots=True)
class _Room:
    tickets: list[Ticket] = field(default_factory=list)
    destination: asyncio.Future[int] | None = None


class PrefillSide:
    """Hold the rooms of a prefill engine."""

    def __init__(
        self, settings: Settings, end: Callable[[Ticket, Finished | Failure], None], wake: Callable[[int], None]
    ) -> None:
        """Start without rooms.

        Args:
            settings: Options of the engine.
            end: Ends a ticket in any stage.
            wake: Makes a rank's scheduler look at its queues.
        """
        self._settings = settings
        self._end = end
        self._wake = wake
        self._rooms: dict[tuple[int, int], _Room] = {}
        self._mismatched: set[int] = set()
        """Ranks that have received a message of another transfer backend or release."""
        self.registered: dict[int, int] = {}
        """Rank per room, for engines that do not follow rooms (``/register_dp_rank``)."""

    def arrive(self, ticket: Ticket) -> None:
        """Let a leg wait for its decode side."""
        leg, work = ticket.leg, ticket.work
        if (text := conflict(leg, work.dp_rank, self._settings)) is not None:
            self._end(ticket, failure(ticket, self._settings, "bootstrap", text))
            return
        if leg.bootstrap_host == FAKE_HOST:
            self._let_in(ticket)
            return
        self._register(ticket)
        room = self._room(ticket)
        room.tickets.append(ticket)
        if room.destination is not None:
            self._let_in(ticket)
            return
        seconds = self._settings.timeouts.bootstrap * self._settings.time_scale
        loop = asyncio.get_running_loop()
        ticket.timer = loop.call_later(seconds, self._timed_out, ticket, self._settings.timeouts.bootstrap)

    def understands(self, dp_rank: int, transfer_backend: str, buffers: int) -> bool:
        """Check whether a rank reads the message of a decode leg.

        A message of another backend ends the thread that reads them (``bootstrap_thread``), and so later ones are not
        read either: legs wait until they time out. More metadata buffers than the rank has end the thread that sends
        them (``send_aux``).
        """
        if transfer_backend != self._settings.transfer_backend or buffers > metadata_buffers(self._settings.release):
            self._mismatched.add(dp_rank)
        return dp_rank not in self._mismatched

    def connect(self, dp_rank: int, number: int) -> asyncio.Future[int]:
        """Take a decode leg's destination.

        Returns:
        X
        """
        room = self._rooms.setdefault((dp_rank, number), _Room())
        room.destination = asyncio.get_running_loop().create_future()
        for ticket in room.tickets:
            self._let_in(ticket)
        return room.destination

    def disconnect(self, dp_rank: int, number: int, destination: asyncio.Future[int]) -> None:
        """End the legs of a room after a decode leg has given up. SGLang reports that to prefill, not the reverse."""
        room = self._rooms.get((dp_rank, number))
        if room is None or room.destination is not destination:
            return
        del self._rooms[dp_rank, number]
        for ticket in room.tickets:
            self._end(ticket, failure(ticket, self._settings, "transfer", "Aborted by AbortReq."))

    def computed(self, ticket: Ticket) -> None:
        """Begin the transfer of a prompt that has been computed."""
        seconds = self._settings.costs.transfer_seconds(ticket.leg.prompt_tokens) * self._settings.time_scale
        ticket.timer = asyncio.get_running_loop().call_later(seconds, self._sent, ticket)

    def forget(self, ticket: Ticket) -> None:
        """Remove a leg that has ended, for any reason. Decode gets no message."""
        key = room_of(ticket)
        room = self._rooms.get(key)
        if room is not None and ticket in room.tickets:
            room.tickets.remove(ticket)
            if not room.tickets:
                del self._rooms[key]
        if self.registered.get(key[1]) is not None:
            del self.registered[key[1]]

    def _sent(self, ticket: Ticket) -> None:
        room = self._rooms.get(room_of(ticket))
        if room is not None and ticket in room.tickets:
            del self._rooms[room_of(ticket)]
            if room.destination is not None and not room.destination.done():
                room.destination.set_result(ticket.work.cached_tokens)
            for other in room.tickets:
                if other is not ticket:
                    self._end(other, failure(other, self._settings, "transfer", TAKEN_AWAY))
        ticket.give(0)
        self._end(ticket, Finished(0))

    def _let_in(self, ticket: Ticket) -> None:
        if ticket.work.stage is Stage.BOOTSTRAP:
            if ticket.timer is not None:
                ticket.timer.cancel()
            ticket.work.stage, ticket.queued_at = Stage.WAITING, time.time()
            self._wake(ticket.work.dp_rank)

    def _timed_out(self, ticket: Ticket, seconds: float) -> None:
        text = f"Request {ticket.leg.bootstrap_room} timed out after {seconds:.1f}s in KVPoll.Bootstrapping"
        self._end(ticket, failure(ticket, self._settings, "bootstrap", text))

    def _register(self, ticket: Ticket) -> None:
        release = self._settings.release
        explicit = ticket.leg.disagg_prefill_dp_rank is not None and release.explicit_rank_skips_conflict_check
        derivable = self._settings.follows_rooms and not self._settings.force_query
        if not derivable and not explicit and ticket.leg.bootstrap_room is not None:
            # With plain DP every replica has the attention-DP rank 0.
            self.registered[ticket.leg.bootstrap_room] = ticket.work.dp_rank if self._settings.dp_attention else 0

    def _room(self, ticket: Ticket) -> _Room:
        return self._rooms.setdefault(room_of(ticket), _Room())
