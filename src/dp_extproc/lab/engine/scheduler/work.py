"""One sequence on its way through one DP rank."""

from dataclasses import dataclass
from enum import StrEnum

from dp_extproc.lab.engine.scheduler.prefix_cache import Node


class Role(StrEnum):
    """What a server does."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


class Stage(StrEnum):
    """Where a sequence is.

    On prefill: bootstrap, waiting, running, inflight. On decode: prealloc, transfer, waiting, running.
    """

    BOOTSTRAP = "bootstrap"
    """On prefill: the decode side has not said yet where the KV cache goes."""
    PREALLOC = "prealloc"
    """On decode: no KV room for the prompt yet, or no contact with the prefill server."""
    TRANSFER = "transfer"
    """On decode: KV room is reserved, the KV cache has not arrived."""
    WAITING = "waiting"
    """For a step to take it in."""
    RUNNING = "running"
    INFLIGHT = "inflight"
    """On prefill: computed, the KV cache is being sent."""
    DONE = "done"


QUEUED_STAGES = frozenset({Stage.BOOTSTRAP, Stage.PREALLOC, Stage.TRANSFER, Stage.WAITING})


@dataclass(slots=True, eq=False)
class Work:
    """A sequence. Its owner creates it; from then on only the scheduler changes it."""

    rid: str
    dp_rank: int
    prompt_tokens: int
    max_new_tokens: int
    room: int | None = None
    """The bootstrap room; None outside disaggregated servers."""
    stage: Stage = Stage.WAITING
    reachable: bool = False
    """On decode: the prefill server has answered, so KV room may be reserved."""
    prefilled: int = 0
    """Prompt tokens computed so far, or found in the prefix cache."""
    generated: int = 0
    held: int = 0
    """KV tokens reserved or in use for it alone."""
    started_at: float | None = None
    """When the first step took it in."""
    prompt: bytes = b""
    """The prompt's tokens, as the prefix cache wants them; empty for one that takes no part in it. Gone in the end."""
    prefix: Node | None = None
    """What it holds of the prefix cache."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache; on decode what prefill has told."""
    foreign_id: int | None = None
    """A token id of its prompt that no vocabulary has."""

    @property
    def context(self) -> int:
        """Tokens that attention looks at: prompt and output so far."""
        return self.prompt_tokens + self.generated

    @property
    def shared(self) -> int:
        """KV tokens that it holds of the prefix cache."""
        return 0 if self.prefix is None else self.prefix.end


@dataclass(frozen=True, slots=True)
class Output:
    """What a step gave one sequence."""

    work: Work
    token: int | None
    """Position of the output token, from 0; None for prefill's last chunk on a disaggregated server."""
    finished: bool
    error: str | None = None
    """Why the sequence ends early: it was evicted for lack of KV room."""
