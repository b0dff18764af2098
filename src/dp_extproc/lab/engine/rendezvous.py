"""Hold what prefill's and decode's half of the rendezvous share: the key of a room, and the text of a failure."""

from typing import Final

from dp_extproc.lab.engine.leg import Failure
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.settings import Settings
from dp_extproc.lab.engine.ticket import Ticket

FAKE_HOST: Final = "2.2.2.2"
"""SGLang's ``FAKE_BOOTSTRAP_HOST``: there is no other side, the transfer succeeds by itself."""
TAKEN_AWAY: Final = "Failed due to an unknown reason from another rank"


def room_of(ticket: Ticket) -> tuple[int, int]:
    """Return the DP rank and the bootstrap room of a leg, by which SGLang keys all state of a room."""
    return ticket.work.dp_rank, ticket.leg.bootstrap_room or 0


def failure(ticket: Ticket, settings: Settings, phase: str, text: str) -> Failure:
    """Word the failure of a leg as the scheduler of a prefill or a decode engine does."""
    side, request = ("Decode", "decode_req.req") if settings.role is Role.DECODE else ("Prefill", "req")
    rank, leg = settings.scheduler_rank(ticket.work.dp_rank), ticket.leg
    return Failure(
        500,
        f"{side} {phase} failed for request rank={rank} {request}.rid={leg.rid!r} "
        f"{request}.bootstrap_room={leg.bootstrap_room} with exception "
        f"KVTransferError(bootstrap_room={leg.bootstrap_room}): {text}",
    )
