"""Schedule one DP rank: its queues, its KV room, and its part of a step.

Rules, after SGLang's ``managers/scheduler.py`` and ``disaggregation/{prefill,decode}.py``:

- All queues are first in, first out; the head blocks those behind it, except that decode passes over sequences whose
  prefill engine has not answered yet.
- Prefill reserves KV room for a whole prompt when the first chunk of it runs, and holds it until the transfer is over.
- Decode reserves KV room for the whole prompt *before* prefill may start, and keeps some back for every sequence that
  it has already accepted (``num_reserved_decode_tokens``).
- Prefill has priority over decode on an engine that does both.
- A prompt is looked up in the prefix cache when its first chunk is about to run, and inserted after every chunk. At
  least its last token is computed. Cached tokens that no sequence uses count as free, and are evicted for others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dp_extproc.lab.engine.scheduler.prefix_cache import TOKEN_BYTES, PrefixCache
from dp_extproc.lab.engine.scheduler.work import QUEUED_STAGES, Output, Role, Stage, Work


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a rank."""

    capacity: int
    """KV tokens."""
    max_running: int
    chunk: int
    """Prompt tokens per step; 0 for no chunks."""
    batch: int = 16384
    """Prompt tokens per step without chunks (``max_prefill_tokens``); a longer prompt runs alone."""
    reserved: int = 512
    """KV tokens kept free per accepted sequence (``num_reserved_decode_tokens``)."""


@dataclass(slots=True, eq=False)
class Rank:
    """The state of a rank."""

    dp_rank: int
    limits: Limits
    role: Role = Role.UNIFIED
    queue: list[Work] = field(default_factory=list)
    """Everything that does not run yet, in the order of arrival; each work's stage names its queue."""
    running: list[Work] = field(default_factory=list)
    inflight: list[Work] = field(default_factory=list)
    chunks: dict[Work, int] = field(default_factory=dict)
    """Prompt tokens per sequence in the step that runs now."""
    cache: PrefixCache = field(default_factory=PrefixCache)
    held: int = 0
    """KV tokens that sequences have for themselves."""
    uncached_tokens: int = 0
    """Prompt tokens computed since the start."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache since the start."""
    generated_tokens: int = 0
    """Output tokens given since the start; none on prefill."""

    def add(self, work: Work, stage: Stage) -> None:
        """Accept a new sequence.

        Args:
            work: Not known to any rank.
            stage: The queue it starts in.
        """
        work.stage = stage
        self.queue.append(work)

    def remove(self, work: Work) -> None:
        """Remove a sequence from any queue; its KV room is free at once, but for what the prefix cache keeps."""
        for place in (self.queue, self.running, self.inflight):
            if work in place:
                place.remove(work)
        self.chunks.pop(work, None)
        self._hold(work, work.shared)
        if work.prefix is not None:
            self.cache.unlock(work.prefix)
        work.prefix, work.prompt = None, b""
        work.stage = Stage.DONE

    def preallocate(self) -> list[Work]:
        """On decode: reserve KV room for the sequences that have some, in order.

        Returns:
            Those that now wait for their KV cache.
        """
        accepted = len(self.running) + sum(work.stage in {Stage.TRANSFER, Stage.WAITING} for work in self.queue)
        found = []
        for work in self.queued(Stage.PREALLOC):
            if not work.reachable:
                continue
            kept_back = self.limits.reserved * accepted
            if accepted >= self.limits.max_running or (accepted and work.prompt_tokens > self.free - kept_back):
                break
            if work.prompt_tokens > self.free:
                break
            work.stage = Stage.TRANSFER
            self._hold(work, work.prompt_tokens)
            accepted += 1
            found.append(work)
        return found

    def plan_prefill(self, now: float) -> int:
        """Choose the prompt tokens of the next step.

        Returns:
            How many; what they are is in ``chunks``.
        """
        self.chunks.clear()
        if self.role is Role.DECODE:
            return 0
        budget = self.limits.chunk or self.limits.batch
        for work in [*self.running, *self.queued(Stage.WAITING)]:
            if work.prefilled >= work.prompt_tokens or budget <= 0:
                continue
            if work.stage is Stage.WAITING and not self._admit(work, now):
                break
            missing = work.prompt_tokens - work.prefilled
            if not self.limits.chunk and self.chunks and missing > budget:
                break
            tokens = min(missing, budget) if self.limits.chunk else missing
            self.chunks[work] = tokens
            budget -= tokens
        return sum(self.chunks.values())

    def finish_prefill(self) -> list[Output]:
        """Apply the prompt tokens of the step that ran."""
        outputs = []
        for work, tokens in list(self.chunks.items()):  # one that is finished leaves the table
            work.prefilled += tokens
            self.uncached_tokens += tokens
            self._keep(work)
            if work.prefilled < work.prompt_tokens:
                continue
            if self.role is Role.PREFILL:
                self.running.remove(work)
                self.inflight.append(work)
                work.stage = Stage.INFLIGHT
                work.generated = 1
                outputs.append(Output(work, None, finished=False))
            else:
                outputs.append(self._token(work))
        self.chunks.clear()
        return outputs

    def merge_arrived(self, now: float) -> list[Output]:
        """Let sequences whose KV cache has arrived run; their first token came with it."""
        outputs: list[Output] = []
        if self.role is not Role.DECODE:
            return outputs
        for work in self.queued(Stage.WAITING):
            if len(self.running) >= self.limits.max_running:
                break
            self._run(work, now)
            work.prefilled = work.prompt_tokens
            outputs.append(self._token(work))
        return outputs

    def finish_decode(self, batch: list[Work]) -> list[Output]:
        """Give every sequence of *batch* that is still here its next token; without KV room the newest is evicted."""
        outputs = []
        for work in batch:
            if work.stage is not Stage.RUNNING:
                continue
            if self.free <= 0:
                victim = self.running[-1]
                self.remove(victim)
                outputs.append(Output(victim, None, finished=True, error="evicted: no KV cache room left"))
                if victim is work:
                    continue
            outputs.append(self._token(work))
        return outputs

    def queued(self, stage: Stage) -> list[Work]:
        """List a queue, oldest first."""
        return [work for work in self.queue if work.stage is stage]

    def decoding(self) -> list[Work]:
        """List the sequences that get a token in a decode step."""
        if self.role is Role.PREFILL:
            return []
        return [work for work in self.running if work.prefilled >= work.prompt_tokens]

    def works(self) -> Iterator[Work]:
        """Iterate over every sequence of this rank."""
        yield from self.queue
        yield from self.running
        yield from self.inflight

    @property
    def used(self) -> int:
        """Count the KV tokens in use; what two sequences share counts once."""
        return self.held + self.cache.locked

    @property
    def free(self) -> int:
        """Count the KV tokens that no sequence uses, cached or not."""
        return self.limits.capacity - self.used

    @property
    def is_empty(self) -> bool:
        return not (self.queue or self.running or self.inflight)

    def transferred(self, work: Work) -> None:
        """On prefill: end a sequence whose KV cache has been sent."""
        self.remove(work)

    def _admit(self, work: Work, now: float) -> bool:
        if len(self.running) >= self.limits.max_running:
            return False
        prefix = self.cache.match(work.prompt, work.prompt_tokens - 1)
        self.cache.lock(prefix)
        kept_back = 0 if self.role is Role.PREFILL else self.limits.reserved * len(self.running)
        if work.prompt_tokens - prefix.end > self.free - kept_back:
            self.cache.unlock(prefix)
            return False
        work.prefix, work.prefilled, work.cached_tokens = prefix, prefix.end, prefix.end
        self.cached_tokens += prefix.end
        self._hold(work, work.prompt_tokens)
        self._run(work, now)
        return True

    def _keep(self, work: Work) -> None:
        """Insert what has been computed of a prompt; what others have inserted meanwhile is not kept twice."""
        if not work.prompt or work.prefix is None:
            return
        total, before = work.held + work.shared, work.prefix
        work.prefix = self.cache.insert(work.prompt[: work.prefilled * TOKEN_BYTES])
        self.cache.lock(work.prefix)
        self.cache.unlock(before)
        self._hold(work, total)

    def _run(self, work: Work, now: float) -> None:
        self.queue.remove(work)
        self.running.append(work)
        work.stage = Stage.RUNNING
        work.started_at = now

    def _token(self, work: Work) -> Output:
        position = work.generated
        work.generated += 1
        self.generated_tokens += 1
        self._hold(work, work.context)
        finished = work.generated >= work.max_new_tokens
        if finished:
            self.remove(work)
        return Output(work, position, finished=finished)

    def _hold(self, work: Work, tokens: int) -> None:
        """Lock *tokens* for a sequence, its part of the prefix cache included."""
        own = tokens - work.shared
        self.held += own - work.held
        work.held = own
        excess = self.held + self.cache.size - self.limits.capacity
        if excess > 0:
            self.cache.evict(excess)


def queued_tokens(rank: Rank, *stages: Stage) -> int:
    """Sum the prompt tokens of some queues of a rank."""
    wanted = set(stages) & QUEUED_STAGES
    return sum(work.prompt_tokens for work in rank.queue if work.stage in wanted)
