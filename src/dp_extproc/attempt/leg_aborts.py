"""Ends the legs of an attempt at their engines, by ``/abort_request``, where a closed connection does not end them."""

from collections.abc import Mapping

from dp_extproc.attempt.gateways import Headers
from dp_extproc.attempt.intake import Intake
from dp_extproc.attempt.machine import Turn
from dp_extproc.scheduling.decision import Decision, LegAbort


class LegAborts:
    """Sends what ends the legs of one attempt."""

    __slots__ = ("_decode", "_intake", "_legs", "are_wanted")

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._decode: LegAbort | None = None
        self._legs: tuple[LegAbort, ...] = ()
        self.are_wanted = False
        """Whether the client has ended the request, or prompts of it, by their ids."""

    @property
    def client_keys(self) -> Mapping[str, tuple[int, ...]]:
        """The keys by which the client may end the request, each with the prompts that it stands for."""
        return self._intake.client_keys

    def follow(self, decision: Decision, passed: Headers) -> None:
        """Follow the legs of a decision; *passed* are headers of the client that an abort has, too."""
        self._decode = decision.abort and decision.abort.passing(passed)
        self._legs = tuple(each.passing(passed) for each in decision.legs)

    def end_prompts(self, turn: Turn, prompts: tuple[int, ...]) -> None:
        """End prompts on all legs, because the client wants that. The engines end the response."""
        self.are_wanted = True
        turn.commands += [each.of(prompts) for each in self._legs]

    def end_decode(self, turn: Turn) -> None:
        """End the decode leg, because nothing on the main stream is sure to end it any more."""
        if self._decode is not None:
            turn.commands.append(self._decode)
            self._decode = None

    def end_before_close(self, turn: Turn) -> None:
        """End the decode leg before a reply closes it, where the engine would not notice the close."""
        if self._decode is not None and self._decode.precedes_close:
            self.end_decode(turn)
