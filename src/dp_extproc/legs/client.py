"""The HTTP client of prefill legs, and the legs that it has sent."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from msgspec.structs import replace

from dp_extproc.attempt.events import LegBody, LegClosed, LegEvent, LegHeaders, LegOpened, LegUnseen, ToLeg
from dp_extproc.legs.listener import LegListener, LegOutcome, NoLegListener, ResendCause
from dp_extproc.legs.request import LegRequest
from dp_extproc.legs.transport import SMALL, Answer, Body, BrokenError, NotSentError, Transport, UnreadableError

RESEND_SECONDS: Final = 1.0
"""Seconds after its start in which a leg may be sent again."""
_RESEND_PAUSE: Final = 0.2
"""Seconds between two tries. The first comes at once: usually it is a connection that was kept open for too long."""
ERROR_BYTES: Final = 65_536
"""Most bytes of an error's text that are read."""
TEXT_BYTES: Final = 64 << 20
"""Most bytes of any other response. Log probabilities of a long prompt are some of them."""
_NOT_HERE: Final = frozenset({502, 503})
"""Statuses with which a proxy before the engine reports that it did not reach the engine."""
_SUCCESS: Final = 200
_REDIRECTS: Final = 300
_ERROR: Final = 400
_DUPLICATE: Final = b"Duplicate request ID"
"""SGLang's text for a request id that runs already: ``tokenizer_manager.py``."""

_log = logging.getLogger(__name__)

Listener = Callable[[LegEvent], object]


class SentLeg:
    """A prefill leg on its way. Its events go to a listener, the last of which is always ``LegClosed``."""

    def __init__(self, client: "LegClient", request: LegRequest, listener: Listener) -> None:
        self._client = client
        self._listener = listener
        self._started = asyncio.get_running_loop().time()
        self._is_resent = False
        self._wants = ToLeg.PROCEED
        """What the listener wants of the body."""
        self._outcome = LegOutcome.CANCELLED
        self._problem = ""
        self._is_lost = False
        """Whether the engine has dropped the connection after it had got the leg."""
        self._is_cancelled = False
        self._body = Body(request.preamble, request.tail)
        loop = asyncio.get_running_loop()
        if self._body.size >= SMALL:  # by then it cannot be sent again
            loop.call_later(RESEND_SECONDS, self._body.release)
        self._task = loop.create_task(self._run(replace(request, preamble=b"", tail=b"")))
        self._task.add_done_callback(self._close)

    def carry_out(self, command: ToLeg) -> None:
        """Carry out a command of the attempt. A response that no command asks for is read and discarded."""
        if command is ToLeg.CANCEL:
            self.cancel()
        elif command is not ToLeg.PROCEED:
            self._wants = command

    def cancel(self) -> None:
        """Close the connection, so that the engine ends the request. No event follows but ``LegClosed``."""
        self._is_cancelled = True
        self._task.cancel()

    async def closed(self) -> None:
        """Wait until the leg has ended."""
        await asyncio.wait([self._task])

    def _report(self, event: LegEvent) -> None:
        if self._is_cancelled and not isinstance(event, LegClosed):
            return
        try:
            self._listener(event)
        except Exception:  # noqa: BLE001 - whatever it is, it ends this leg alone
            _log.exception("a listener of a prefill leg has failed")
            self.cancel()

    def _close(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a prefill leg has failed unexpectedly", exc_info=error)
            self._outcome, self._problem = LegOutcome.RESET, "unexpected error; the log of the router has the cause"
        self._client.ended(self, self._outcome, asyncio.get_running_loop().time() - self._started)
        self._report(LegClosed(self._problem, is_lost=self._is_lost))

    async def _run(self, request: LegRequest) -> None:
        self._report(LegOpened())
        try:
            async with asyncio.timeout(request.timeout) as deadline:
                await self._send(request, deadline)
        except TimeoutError:
            self._fail(LegOutcome.TIMEOUT, "the prefill server has not answered in time")
        except NotSentError as error:
            self._fail(LegOutcome.REFUSED, f"the prefill server was not reached: {error}")
        except UnreadableError as error:
            self._fail(LegOutcome.UNREADABLE, f"the prefill server gave no HTTP response: {error}")
        except BrokenError as error:
            self._is_lost = True
            self._fail(LegOutcome.RESET, f"the prefill server's connection was cut: {error}")

    def _fail(self, outcome: LegOutcome, problem: str) -> None:
        self._outcome, self._problem = outcome, problem

    async def _send(self, request: LegRequest, deadline: asyncio.Timeout) -> None:
        """Send the leg until it has an answer, or must not be sent again."""
        loop = asyncio.get_running_loop()
        last = self._started + RESEND_SECONDS
        pause, is_fresh = 0.0, False
        while True:
            try:
                with await self._client.transport.send(request, self._body, is_fresh=is_fresh) as answer:
                    text = await _read_briefly(answer) if answer.status in _NOT_HERE else b""
                    if answer.status in _NOT_HERE and not text.lstrip().startswith(b"{") and loop.time() + pause < last:
                        raise NotSentError(f"a proxy answered {answer.status}", ResendCause.UNAVAILABLE)  # noqa: TRY301
                    deadline.reschedule(loop.time() + request.rest_timeout)
                    await self._receive(answer, text)
                    return
            except NotSentError as error:
                if error.cause is None or loop.time() + pause >= last or self._body.parts is None:
                    raise
                self._client.resent(error.cause)
            self._is_resent = is_fresh = True
            await asyncio.sleep(pause)
            pause = _RESEND_PAUSE

    async def _receive(self, answer: Answer, text: bytes) -> None:
        """Report the response. *text* was read of it already."""
        status = answer.status
        self._outcome = LegOutcome.ANSWERED if status < _ERROR else LegOutcome.STATUS
        if status == _ERROR and self._is_resent:
            text = await _read_briefly(answer)
            if _DUPLICATE in text:
                self._outcome = LegOutcome.UNSEEN
                self._report(LegUnseen())
                return
        self._body.release()
        if not _SUCCESS <= status < _REDIRECTS and status < _ERROR:
            raise UnreadableError(f"the status {status} is no answer to it")
        self._report(LegHeaders(status, end_of_stream=answer.is_empty and not text, is_events=answer.is_events))
        kept = bytearray()
        try:
            await self._read(answer, text, kept)
        except BrokenError:
            if kept:
                self._report(LegBody(bytes(kept), end_of_stream=True))
            raise
        if self._wants is not ToLeg.PROCEED:
            self._report(LegBody(bytes(kept), end_of_stream=True))

    async def _read(self, answer: Answer, text: bytes, kept: bytearray) -> None:
        """Read the body to its end, or as much as is wanted of it."""
        is_kept = self._wants is ToLeg.BUFFER_BODY
        size = 0
        chunk = text or await answer.read()
        while chunk:
            size += len(chunk)
            if is_kept:
                kept += chunk[: ERROR_BYTES - len(kept)]
                if size >= ERROR_BYTES:
                    return
            elif self._wants is ToLeg.STREAM_BODY:
                self._report(LegBody(chunk, end_of_stream=False))
            if size >= TEXT_BYTES:
                raise UnreadableError(f"its response is larger than {TEXT_BYTES} bytes")
            chunk = await answer.read()


async def _read_briefly(answer: Answer) -> bytes:
    """Read the text of an error, as far as it comes at once."""
    text = bytearray()
    with suppress(TimeoutError, BrokenError):
        async with asyncio.timeout(RESEND_SECONDS):
            while len(text) < ERROR_BYTES and (chunk := await answer.read()):
                text += chunk
    return bytes(text[:ERROR_BYTES])


class LegClient:
    """Sends prefill legs. There is no limit on connections: a limit would make legs wait for each other.

    One client serves a whole worker process.
    """

    def __init__(self, listener: LegListener | None = None) -> None:
        self.transport = Transport()
        self._listener: LegListener = listener or NoLegListener()
        self._in_flight: set[SentLeg] = set()

    def send(self, request: LegRequest, listener: Listener) -> SentLeg:
        """Send a leg, in a task of its own. *listener* gets its events, none of them within this call."""
        leg = SentLeg(self, request, listener)
        self._in_flight.add(leg)
        self._listener.leg_sent()
        return leg

    def __len__(self) -> int:
        return len(self._in_flight)

    def __iter__(self) -> Iterator[SentLeg]:
        return iter(list(self._in_flight))

    async def close(self) -> None:
        """Cancel the legs in flight, and close all connections."""
        legs = list(self._in_flight)
        for leg in legs:
            leg.cancel()
        for leg in legs:
            await leg.closed()
        await self.transport.close()

    def resent(self, cause: ResendCause) -> None:
        """Take note that a leg is sent again."""
        self._listener.leg_resent(cause)

    def ended(self, leg: SentLeg, outcome: LegOutcome, seconds: float) -> None:
        """Take note of the end of a leg."""
        self._in_flight.discard(leg)
        self._listener.leg_ended(outcome, seconds)
