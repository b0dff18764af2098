"""Run an engine without its HTTP: legs come in, tokens come out."""

import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from dp_extproc.lab.engine.controller import Controller, EngineKilledError
from dp_extproc.lab.engine.leg import Failure, Finished, Leg, RefusedError
from dp_extproc.lab.engine.pace import Pace
from dp_extproc.lab.engine.prefill_side import PrefillSide
from dp_extproc.lab.engine.scheduler.group import Group, Step
from dp_extproc.lab.engine.scheduler.prefix_cache import TOKEN_BYTES, PrefixCache
from dp_extproc.lab.engine.scheduler.rank import Rank
from dp_extproc.lab.engine.scheduler.snapshot import RankHistory
from dp_extproc.lab.engine.scheduler.work import Output, Role, Stage, Work
from dp_extproc.lab.engine.settings import EngineKind, Settings
from dp_extproc.lab.engine.ticket import Ticket

if TYPE_CHECKING:
    from dp_extproc.lab.engine.decode_side import DecodeSide

_FIRST_STAGE = {Role.PREFILL: Stage.BOOTSTRAP, Role.DECODE: Stage.PREALLOC, Role.UNIFIED: Stage.WAITING}


def kill_engine(reason: str) -> None:
    """End as SGLang does when a scheduler or the controller raises: all processes, at once."""
    sys.stderr.write(f"engine: killed by a request: {reason}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


class Engine:
    """Hold the schedulers of one engine."""

    def __init__(self, settings: Settings, *, on_end: Callable[[Ticket], None], kill: Callable[[str], None]) -> None:
        """Build the ranks; nothing runs yet.

        Args:
            settings: Options of the engine.
            on_end: Called once for every ticket that ends.
            kill: Called when a request ends the engine.
        """
        self.settings = settings
        self.present_role = settings.role
        """The role that its pages report. Legs are computed in the first role alone, so after a switch none is."""
        now = time.time()
        self.ranks = [Rank(rank, settings.limits, settings.role) for rank in range(settings.dp_size)]
        members = [self.ranks] if settings.dp_attention else [[rank] for rank in self.ranks]
        self.groups = [Group(ranks, settings.costs) for ranks in members]
        self.histories = [
            RankHistory(
                rank,
                settings.decode_log_interval,
                reports_last_batch=settings.release.since("0.5.17"),
                estimates_hits=settings.release.since("0.5.20"),
                keeps_statistics=settings.enable_metrics,
                publishes_stalls=settings.release.since("0.5.19") or settings.kind is EngineKind.VLLM,
                counts_first_steps=settings.release.since("0.5.21") or not settings.release.since("0.5.18"),
                counts_long_steps=settings.release.since("0.5.23") or not settings.release.since("0.5.18"),
                time_scale=settings.time_scale,
                counted_since=now,
            )
            for rank in self.ranks
        ]
        self.prefill_side = PrefillSide(settings, self.end, self._wake)
        self.decode_side = _decode_side(settings, self.end, self._wake, kill)
        self.stepping = [False] * len(self.groups)
        self.paces = [Pace() for _ in self.groups]
        self._controller = Controller(settings)
        self._on_end = on_end
        self.kill = kill
        self._tickets: dict[Work, Ticket] = {}
        self._rids: dict[str, Ticket] = {}
        """Requests that the HTTP process has a state of (``rid_to_state``)."""
        self._wakes = [asyncio.Event() for _ in self.groups]
        self._goes_on = asyncio.Event()
        """Not set while the schedulers hang."""
        self._goes_on.set()
        for history in self.histories:
            history.publish(now)
            history.report(now)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the schedulers' loops."""
        if self.decode_side is not None:
            await self.decode_side.prepare()
        loops = [asyncio.ensure_future(self._run(index)) for index in range(len(self.groups))]
        for loop in loops:
            loop.add_done_callback(self._crashed)
        try:
            yield
        finally:
            for loop in loops:
                loop.cancel()
            for ticket in self._tickets.values():
                ticket.stop_waiting()
            if self.decode_side is not None:
                await self.decode_side.close()

    def submit(self, legs: Iterable[Leg], *, streaming: bool = False) -> list[Ticket]:
        """Send legs to their ranks.

        Raises:
            RefusedError: The HTTP process refuses the request; none of its legs has been taken.
        """
        legs = list(legs)
        if self.present_role is not self.settings.role:
            raise RefusedError(f"the stand-in computes nothing as {self.present_role}")
        for leg in legs:
            self._controller.check(leg)
            self._check_length(leg)
        seen = set(self._rids)
        for leg in legs:
            if leg.rid in seen:
                raise RefusedError(f"Duplicate request ID detected: {leg.rid}")
            seen.add(leg.rid)
        return [self._take(leg, streaming=streaming) for leg in legs]

    def switch_role(self, role: Role) -> str | None:
        """Take another role.

        Returns:
            Why that is refused; None if it is not.
        """
        if not self.settings.role_switch:
            return "--enable-pd-role-switch is not set on this server"
        if role is Role.UNIFIED or self.settings.role is Role.UNIFIED:
            return f"invalid target role {role}"
        if role is not self.present_role and self._tickets:
            return "instance is not idle; drain all requests before switching"
        self.present_role = role
        return None

    def abort(self, rid: str) -> None:
        """Abort what ``/abort_request`` names: the HTTP process needs the exact id, schedulers match by prefix."""
        if rid not in self._rids:
            return
        for ticket in [ticket for ticket in self._tickets.values() if ticket.leg.rid.startswith(rid)]:
            self.end(ticket, Failure(None, "Abort requested"))

    def abort_all(self) -> None:
        for ticket in list(self._tickets.values()):
            self.end(ticket, Failure(None, "Abort requested"))

    def forget(self, tickets: Iterable[Ticket]) -> None:
        """Drop the states of requests in the HTTP process; the schedulers go on, and no abort finds them."""
        for ticket in tickets:
            self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        if self._rids.get(ticket.leg.rid) is ticket:
            del self._rids[ticket.leg.rid]

    def flush_caches(self) -> bool:
        """Empty the prefix cache of each idle rank.

        Returns:
            Whether all of them did.
        """
        idle = [rank for rank in self.ranks if rank.is_empty]
        for rank in idle:
            rank.cache = PrefixCache()
        return len(idle) == len(self.ranks)

    def end(self, ticket: Ticket, how: Finished | Failure) -> None:
        """End a leg in any stage, and free what it holds."""
        rank = self.ranks[ticket.work.dp_rank]
        if ticket.work.stage is not Stage.DONE:
            rank.remove(ticket.work)
        ticket.finish(how)
        if self._tickets.pop(ticket.work, None) is None:
            return
        self._forget(ticket)
        self.prefill_side.forget(ticket)
        if self.decode_side is not None:
            self.decode_side.forget(ticket)
        self._on_end(ticket)
        self._wake(rank.dp_rank)

    def hang(self, hangs: bool) -> None:  # noqa: FBT001 - its only purpose
        """Let all schedulers hang, or go on."""
        if hangs:
            self._goes_on.clear()
        else:
            self._goes_on.set()

    def refresh(self) -> None:
        """Let idle schedulers do their periodic work; call it before reading histories."""
        if not self._goes_on.is_set():
            return
        now = time.time()
        for index, group in enumerate(self.groups):
            if not self.stepping[index]:
                for rank in group.ranks:
                    self.histories[rank.dp_rank].idle(now)

    def _take(self, leg: Leg, *, streaming: bool) -> Ticket:
        try:
            chosen = self._controller.choose(leg, self.ranks)
            self._controller.check_shape(leg)
        except EngineKilledError as error:
            self.kill(str(error))
            chosen = 0
        wanted = 1 if self.settings.role is Role.PREFILL else max(1, leg.max_new_tokens)
        prompt = leg.prompt if self.settings.caches_prefixes else b""
        failure = self._refused_by_scheduler(leg)
        if failure is not None and self._computes_rejected(leg):
            leg, prompt, failure = replace(leg, prompt_tokens=1), prompt and bytes(TOKEN_BYTES), None
        work = Work(leg.rid, chosen, leg.prompt_tokens, wanted, leg.bootstrap_room, prompt=prompt)
        leg = replace(leg, prompt=b"")  # the journal keeps legs for long, and bodies apart from them
        ticket = Ticket(leg, work, streaming)
        self._tickets[work] = self._rids[leg.rid] = ticket
        if failure is not None:
            asyncio.get_running_loop().call_soon(self.end, ticket, failure)
            return ticket
        self.ranks[chosen].add(work, _FIRST_STAGE[self.settings.role])
        if self.settings.role is Role.PREFILL:
            self.prefill_side.arrive(ticket)
        elif self.decode_side is not None:
            self.decode_side.arrive(ticket)
        self._wake(chosen)
        return ticket

    def _refused_by_scheduler(self, leg: Leg) -> Failure | None:
        if self.settings.role is not Role.UNIFIED and leg.bootstrap_room is None:
            text = f"Disaggregated request received without bootstrap room id. req.rid={leg.rid!r}"
            return Failure(400, f"Invalid request: {text}")
        limit = self.settings.max_input
        if leg.prompt_tokens >= limit and self.settings.kind is EngineKind.SGLANG:
            return Failure(
                400,
                f"Input length ({leg.prompt_tokens} tokens) exceeds the maximum allowed length ({limit} tokens). "
                "Use a shorter input or enable --allow-auto-truncate.",
            )
        return None

    def _computes_rejected(self, leg: Leg) -> bool:
        """Whether a prompt that is too long is computed as one token, and answered as if it were right."""
        is_prefill = self.settings.role is Role.PREFILL and leg.bootstrap_room is not None
        return is_prefill and self.settings.release.computes_rejected_prompts

    def _check_length(self, leg: Leg) -> None:
        limit = self.settings.context_length
        if leg.prompt_tokens >= limit:
            raise RefusedError(
                f"The input ({leg.prompt_tokens} tokens) is longer than the model's context length ({limit} tokens)."
            )
        total = leg.prompt_tokens + leg.max_new_tokens
        if total > limit:
            raise RefusedError(
                f"Requested token count exceeds the model's maximum context length of {limit} tokens. You requested a "
                f"total of {total} tokens: {leg.prompt_tokens} tokens from the input messages and {leg.max_new_tokens} "
                "tokens for the completion."
            )

    async def _run(self, index: int) -> None:
        group, wake, pace = self.groups[index], self._wakes[index], self.paces[index]
        while True:
            wake.clear()
            await self._goes_on.wait()
            if self.decode_side is not None:
                for work in [work for rank in group.ranks for work in rank.preallocate()]:
                    self.decode_side.allocated(self._tickets[work])
            step, outputs = group.begin(time.time())
            self._deliver(outputs)
            if step is not None:
                await self._step(index, step, pace)
            elif not outputs:
                self._rest(index)
                await wake.wait()
                pace.rest()

    async def _step(self, index: int, step: Step, pace: Pace) -> None:
        group, seconds = self.groups[index], step.seconds * self.settings.time_scale
        self._look_up_embeddings(group)
        histories = [self.histories[rank.dp_rank] for rank in group.ranks]
        self.stepping[index] = True
        for history, batch in zip(histories, step.batches, strict=True):
            history.begin_step(batch)
        await pace.step(seconds)
        await self._goes_on.wait()
        now = time.time()
        for history, batch in zip(histories, step.batches, strict=True):
            history.finish_step(batch, seconds, now)
        outputs = group.finish()
        for history, batch in zip(histories, step.batches, strict=True):
            history.report_batch(batch, now)
        self._deliver(outputs)

    def _look_up_embeddings(self, group: Group) -> None:
        """End at a token id that the embedding has no row for, unless it is sharded: each shard masks ids of others."""
        if self.settings.kind is EngineKind.VLLM or self.settings.attn_tp_size > 1:
            return
        for work in [work for rank in group.ranks for work in rank.chunks if work.unknown_id is not None]:
            self.kill(f"IndexError: index out of range in self (VocabParallelEmbedding, token id {work.unknown_id})")

    def _crashed(self, loop: asyncio.Future[None]) -> None:
        if not loop.cancelled() and (error := loop.exception()) is not None:
            self.kill("".join(traceback.format_exception(error)))

    def _rest(self, index: int) -> None:
        if self.stepping[index]:
            self.stepping[index] = False
            for rank in self.groups[index].ranks:
                self.histories[rank.dp_rank].fall_idle(time.time())
        self.refresh()

    def _deliver(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            ticket = self._tickets.get(output.work)
            if ticket is None:
                continue
            if output.error is not None:
                self.end(ticket, Failure(503, output.error))
            elif output.token is None:
                self.prefill_side.computed(ticket)
            else:
                ticket.give(output.token)
                if output.finished:
                    self.end(ticket, Finished(len(ticket.tokens)))

    def _wake(self, dp_rank: int) -> None:
        self._wakes[0 if len(self.groups) == 1 else dp_rank].set()


def _decode_side(
    settings: Settings,
    end: Callable[[Ticket, Finished | Failure], None],
    wake: Callable[[int], None],
    kill: Callable[[str], None],
) -> "DecodeSide | None":
    if settings.role is not Role.DECODE:
        return None
    from dp_extproc.lab.engine.decode_side import DecodeSide  # noqa: PLC0415 - HTTP clients are slow to import

    return DecodeSide(settings, end, wake, kill)
