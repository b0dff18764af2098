"""The vocabulary of the fleet: endpoints, what an engine says of itself, and samples of its load. Pure data."""

from dataclasses import dataclass
from enum import StrEnum

from dp_extproc.config.pools import Engine


def in_url(host: str) -> str:
    """Write a host name or an address as it stands before a port: IPv6 in brackets, but never in two pairs."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class Role(StrEnum):
    """What a server does for a pool."""

    PREFILL = "prefill"
    DECODE = "decode"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine server as configured. What is None is discovered from the engine."""

    url: str
    """``http://host:port``, as configured; the endpoint's name in logs, metrics and the admin port."""
    host: str
    port: int
    pool: str
    role: Role
    dp_size: int | None = None
    dp_rank: int | None = None
    """The one rank that answers here, of an engine that gives each rank a listener of its own."""
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    engine: Engine = Engine.AUTO
    needs_overrides: bool = False
    """Whether it is to be told ranks and rooms by headers."""
    headers_only: bool = False
    """Whether it can be told in no other way, as bodies are not seen."""


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """An engine's release. Pre- and post-release suffixes do not change what the wire carries."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


class Mode(StrEnum):
    """An engine's ``disaggregation_mode``."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "null"


class Kind(StrEnum):
    """What a server runs."""

    SGLANG = "SGLang"
    VLLM = "vLLM"


@dataclass(frozen=True, slots=True)
class PairTerms:
    """What a prefill and a decode server must agree on; see :mod:`dp_extproc.engines.compatibility`. None: not told."""

    page_size: int | None = None
    kv_cache_dtype: str | None = None
    """As written on the command line, or made of it by the release; ``auto`` where only the model tells."""
    transfer_backend: str | None = None
    model_path: str | None = None
    served_name: str | None = None
    """What the model is called by an operator; None where it is called by its path."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself: SGLang on /server_info, vLLM on /version, /v1/models and /metrics."""

    version: Version | None
    """None when what the engine calls its version names no release."""
    dp_ranks: int
    """DP ranks of the whole server: ``dp_size * attn_dp_size`` (attn_dp_size exists from 0.5.22 on)."""
    mode: Mode
    dp_attention: bool
    """False on a server with several ranks means plain DP: replicas without a common step."""
    served_model: str | None
    bootstrap_port: int | None
    load_balance_method: str | None
    follows_rooms: bool
    """Whether the server itself dispatches by ``bootstrap_room mod dp_ranks``."""
    metrics_enabled: bool | None = None
    """Whether it was started with ``--enable-metrics``; None when it does not say."""
    role_can_switch: bool = False
    """Whether it was started with ``--enable-pd-role-switch``; ``mode`` is then the role it has now."""
    step_tokens: int = 8192
    """Prompt tokens that one rank computes in a step at most."""
    chunked: bool = True
    """Whether a longer prompt is cut into several steps; if not, it runs alone."""
    prefix_cache: bool = True
    """Whether its ranks keep the KV cache of prompts for others with the same beginning."""
    kind: Kind = Kind.SGLANG
    reads_overrides: bool | None = None
    """Whether ``x-override-*`` headers are obeyed (SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1); None when it is not
    known, or nobody needs to know."""
    listener: tuple[int, int] | None = None
    """``(rank, ranks)`` where each rank has a listener of its own: which one this is, of how many on the whole server.
    ``dp_ranks`` is 1 then."""
    terms: PairTerms = PairTerms()

    def place_of(self, rank: int) -> tuple[int, int]:
        """Give ``(rank, ranks)`` as the whole server counts them."""
        return self.listener or (rank, self.dp_ranks)


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """What a rank has decoded since its engine started."""

    steps: float
    sequences: float
    """Those of every step, added up."""
    seconds: float
    tokens: float
    """Made; with speculative decoding more than one for each sequence in a step."""

    @property
    def pace(self) -> float:
        """Seconds per token of a sequence."""
        return self.seconds / self.steps * self.sequences / self.tokens

    def since(self, earlier: "DecodeSteps") -> "DecodeSteps | None":
        """Give what was decoded since an earlier count; None if nothing was, or the engine has started anew.

        Less than one step, or less than one token, is nothing: :attr:`pace` divides by both.
        """
        made = DecodeSteps(
            self.steps - earlier.steps,
            self.sequences - earlier.sequences,
            self.seconds - earlier.seconds,
            self.tokens - earlier.tokens,
        )
        return made if min(made.steps, made.sequences, made.tokens) >= 1 and made.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class RankSample:
    """The load of one DP rank at one moment. What the engine's version does not tell is None."""

    dp_rank: int
    used_tokens: int
    """KV tokens in use by running and transferring requests; no queued work."""
    total_tokens: int | None = None
    """``used_tokens`` plus the prompt tokens of all queued requests; /v1/loads from 0.5.11 on."""
    waiting_uncached_tokens: int | None = None
    running_requests: int = 0
    waiting_requests: int = 0
    capacity_tokens: int | None = None
    max_running_requests: int | None = None
    tokens_per_second: float | None = None
    """Output tokens that the rank makes, over some seconds before; a pause in them counts."""
    decoded: DecodeSteps | None = None
    age: float | None = None
    """Seconds between the rank's own time stamp and the page it stands on; None when there is no time stamp."""

    @property
    def is_empty(self) -> bool:
        """Whether the rank has nothing at all to do."""
        return not (self.used_tokens or self.total_tokens or self.running_requests or self.waiting_requests)

    @property
    def tokens(self) -> int:
        """The load that it tells: with queued work where the engine tells of it."""
        return self.used_tokens if self.total_tokens is None else self.total_tokens


@dataclass(frozen=True, slots=True)
class LoadPage:
    """One reading of an engine's load source."""

    ranks: tuple[RankSample, ...]
    """Sorted by rank, each rank at most once."""
    prompt_tokens: int | None = None
    """Prompt tokens of the whole server since its start, by its own count; None when the page does not tell."""
    uncached_prompt_tokens: int | None = None
    """Of those the ones that no prefix cache held; /v1/loads from 0.5.17 on."""
    silent_ranks: tuple[int, ...] = ()
    """Ranks that the page names but that have not published a load yet. Sorted; none of them is in ``ranks``."""
