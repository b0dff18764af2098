"""Describe one sequence on its way through one DP rank."""

from dataclasses import dataclass
from enum import StrEnum

from dp_extproc.lab.engine.scheduler.prefix_cache import Node


class Role(StrEnum):
    """The role of an engine."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


class Stage(StrEnum):
    """The stage of a sequence.

    On prefill: bootstrap, waiting, running, inflight. On decode: prealloc, transfer, waiting, running.
    """

    BOOTSTRAP = "bootstrap"
    """On prefill: the decode side has not named the destination of the KV cache yet."""
    PREALLOC = "prealloc"
    """On decode: no KV room for the prompt yet, or no contact with the prefill engine."""
    TRANSFER = "transfer"
    """On decode: KV room is reserved, the KV cache has not arrived."""
    WAITING = "waiting"
    """Waits for a step."""
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
    """The bootstrap room; None outside disaggregated engines."""
    stage: Stage = Stage.WAITING
    reachable: bool = False
    """On decode: the prefill engine has answered, so KV room may be reserved."""
    prefilled: int = 0
    """Prompt tokens computed so far, or found in the prefix cache."""
    generated: int = 0
    held: int = 0
    """KV tokens reserved or in use for it alone."""
    started_at: float | None = None
    """Moment of its first step."""
    prompt: bytes = b""
    """The prompt's tokens in the form of the prefix cache; empty without one. Cleared at the end."""
    prefix: Node | None = None
    """Its part of the prefix cache."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache; on decode the number that prefill reported."""
    unknown_id: int | None = None
    """A token id of its prompt that no vocabulary has."""

    @property
    def context(self) -> int:
        """Count the tokens that attention reads: prompt and output so far."""
        return self.prompt_tokens + self.generated

    @property
    def shared(self) -> int:
        """Count the KV tokens that it shares through the prefix cache."""
        return 0 if self.prefix is None else self.prefix.end


@dataclass(frozen=True, slots=True)
class Output:
    """The output of a step for one sequence."""

    work: Work
    token: int | None
    """Position of the output token, from 0; None for prefill's last chunk on a disaggregated engine."""
    finished: bool
    error: str | None = None
    """The reason why the sequence ends early: it was evicted for lack of KV room."""
