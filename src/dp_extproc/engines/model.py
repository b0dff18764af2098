"""What an endpoint is configured to be, what its engine reports about itself, and samples of its load. Pure data."""

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from dp_extproc.config.load import LoadSource
from dp_extproc.config.pools import EngineKind

DEFAULT_STEP_TOKENS: Final = 8192
"""SGLang's ``--chunked-prefill-size`` on current GPUs, for an engine that does not report it."""


class Role(StrEnum):
    """What an endpoint does for its pool."""

    PREFILL = "prefill"
    DECODE = "decode"
    WORKER = "worker"


class SourceKind(StrEnum):
    """What reports an endpoint."""

    STATIC = "static"
    """The list ``endpoints`` of the configuration."""
    DNS = "dns"
    FILE = "file"
    KUBERNETES = "kubernetes"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint as its source reports it. A value of None is read from the engine instead."""

    url: str
    """``http://host:port`` or ``https://host:port``; the endpoint's name in logs, metrics and the admin port."""
    host: str
    port: int
    pool: str
    role: Role
    dp_size: int | None = None
    dp_rank: int | None = None
    """The only DP rank behind this endpoint, of an engine that has one port for each rank."""
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    engine: EngineKind = EngineKind.AUTO
    needs_overrides: bool = False
    """Whether the pool is configured to send routing fields as headers."""
    headers_only: bool = False
    """Whether headers are the only place for routing fields, because the service does not see bodies."""
    source: SourceKind = SourceKind.STATIC
    uid: str = ""
    """Identity of the engine behind the URL, such as the UID of a pod; empty where a source has only addresses."""
    name: str = ""
    """Name of the engine for logs, such as that of a pod."""
    group: str | None = None
    """Revision group. Prefill and decode endpoints of two groups are never paired; None can be paired with any."""

    def is_same(self, other: "Endpoint") -> bool:
        """Return whether both are one engine in one role: at the same URL, and with the same uid if both have one."""
        return (self.url, self.role) == (other.url, other.role) and is_same_uid(self.uid, other.uid)


def is_same_uid(one: str, other: str) -> bool:
    """Return whether two uids at one URL may be of the same engine. A source of addresses alone has none."""
    return one == other or not one or not other


def in_url(host: str) -> str:
    """Write a host name or an address as it stands before a port: IPv6 in one pair of brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """The release of an engine. Suffixes such as ``rc1`` or ``.post1`` change nothing in its API and are left out."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


_FIRST: Final = Version(0, 1, 0)
"""Bound of what counts as a release."""
_VERSION: Final = re.compile(r"v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})(?!\d)")


def parse_version(text: object) -> Version | None:
    """Read ``0.5.10.post1``, ``0.5.23rc1``, ``0.5.11.dev3+g0123abc`` as their release; None if it is none.

    A build from source without a tag calls itself ``0.0.0.dev0`` (``sglang/version.py``) or, by setuptools-scm,
    ``0.0.0.dev1+g0123abc`` or ``0.1.dev1+g0123abc``. That names no release: there is none below 0.1. Suffixes of
    private builds need not follow PEP 440.
    """
    match = _VERSION.match(text.strip()) if isinstance(text, str) else None
    version = Version(int(match[1]), int(match[2]), int(match[3])) if match else None
    return version if version and version >= _FIRST else None


class Mode(StrEnum):
    """An engine's ``disaggregation_mode``."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "null"


MODE_OF: Final = {Role.PREFILL: Mode.PREFILL, Role.DECODE: Mode.DECODE, Role.WORKER: Mode.UNIFIED}
"""The ``disaggregation_mode`` that an engine of each role must have."""


class Kind(StrEnum):
    """The program that an engine runs."""

    SGLANG = "SGLang"
    VLLM = "vLLM"


@dataclass(frozen=True, slots=True)
class PairTerms:
    """Settings on which a prefill and a decode engine must agree; None where the engine does not report one.

    :mod:`dp_extproc.engines.compatibility` compares them.
    """

    page_size: int | None = None
    kv_cache_dtype: str | None = None
    """As given on the command line, or as the release resolved it; ``auto`` where it depends on the model."""
    transfer_backend: str | None = None
    model_path: str | None = None
    served_name: str | None = None
    """The name that an operator gave to the model; None if the model goes by its path."""
    pp_size: int | None = None
    attn_tp_size: int | None = None
    """Tensor-parallel ranks that divide the attention heads of one DP rank."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model, or an adapter of one, as an engine lists it on ``/v1/models``."""

    name: str
    parent: str | None
    """The model of an adapter; None for a model."""
    members: bytes
    """The whole card, as a JSON object."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine reports about itself, other than its load. A default stands for what it does not report."""

    version: Version | None
    """None if the reported version names no release."""
    dp_ranks: int
    """DP ranks of the whole engine: ``dp_size * attn_dp_size`` (``attn_dp_size`` exists from 0.5.22 on)."""
    mode: Mode
    dp_attention: bool = False
    """False with several ranks means plain DP: replicas without a common step."""
    served_model: str | None = None
    bootstrap_port: int | None = None
    load_balance_method: str | None = None
    follows_rooms: bool = False
    """Whether the engine itself picks the rank ``bootstrap_room mod dp_ranks``."""
    metrics_enabled: bool | None = None
    """Whether it was started with ``--enable-metrics``; None if it does not report that."""
    role_can_switch: bool = False
    """Whether it was started with ``--enable-pd-role-switch``; ``mode`` is then its present role."""
    step_tokens: int = DEFAULT_STEP_TOKENS
    """The most prompt tokens that one rank computes in one step."""
    chunked: bool = True
    """Whether a longer prompt is split into several steps. Otherwise it has a step of its own."""
    prefix_cache: bool = True
    """Whether its ranks keep the KV cache of a prompt for later prompts with the same prefix."""
    kind: Kind = Kind.SGLANG
    reads_overrides: bool | None = None
    """Whether ``x-override-*`` headers are obeyed (SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1); None if that is unknown
    or not needed."""
    single_rank: tuple[int, int] | None = None
    """``(rank, ranks)`` of an endpoint with only one rank of an engine: its number, and how many ranks the engine has.
    ``dp_ranks`` is 1 then."""
    terms: PairTerms = PairTerms()
    cards: tuple[ModelCard, ...] = field(default=(), compare=False)
    """Its models and adapters. They change while the engine runs, and an engine with others is the same one."""

    def position_of(self, rank: int) -> tuple[int, int]:
        """Return ``(rank, ranks)`` as the whole engine counts them."""
        return self.single_rank or (rank, self.dp_ranks)


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """Totals of what a rank has decoded since its engine started."""

    steps: float
    sequences: float
    """The sequences of each step, added up."""
    seconds: float
    tokens: float
    """Output tokens. With speculative decoding a sequence may get several in one step."""

    @property
    def tpot(self) -> float:
        """Time per output token of a sequence, in seconds."""
        return self.seconds / self.steps * self.sequences / self.tokens

    def since(self, earlier: "DecodeSteps") -> "DecodeSteps | None":
        """Subtract an earlier count; None if nothing was decoded since then, or the engine was restarted.

        Less than one step or one token counts as nothing, because :attr:`tpot` divides by both.
        """
        made = DecodeSteps(
            self.steps - earlier.steps,
            self.sequences - earlier.sequences,
            self.seconds - earlier.seconds,
            self.tokens - earlier.tokens,
        )
        return made if min(made.steps, made.sequences, made.tokens) >= 1 and made.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class PrefillSteps:
    """Totals of what a rank has computed of prompts since its engine started."""

    tokens: float
    """Prompt tokens that were not cached."""
    seconds: float
    """Time of the steps that computed them. Until 0.5.22 neither counts steps of two seconds or more."""


@dataclass(frozen=True, slots=True)
class RankSample:
    """The load of one DP rank at one moment. A value that the engine does not report is None."""

    dp_rank: int
    used_tokens: int
    """KV tokens in use by running and transferring requests, without queued work."""
    total_tokens: int | None = None
    """``used_tokens`` plus the prompt tokens of all queued requests; /v1/loads from 0.5.11 on."""
    waiting_uncached_tokens: int | None = None
    running_requests: int = 0
    waiting_requests: int = 0
    capacity_tokens: int | None = None
    max_running_requests: int | None = None
    tokens_per_second: float | None = None
    """Output tokens per second, averaged by the engine over the last seconds, pauses included."""
    decoded: DecodeSteps | None = None
    prefilled: PrefillSteps | None = None
    """None also of releases that count the time of overlapping steps twice."""
    age: float | None = None
    """Seconds between the rank's own time stamp and that of its page; None without a time stamp."""

    @property
    def is_empty(self) -> bool:
        """Whether the rank has no work at all."""
        return not (self.used_tokens or self.total_tokens or self.running_requests or self.waiting_requests)

    @property
    def tokens(self) -> int:
        """The reported load in tokens, queued work included where the engine reports it."""
        return self.used_tokens if self.total_tokens is None else self.total_tokens


@dataclass(frozen=True, slots=True)
class LoadPage:
    """One read of the page on which an engine reports its load."""

    ranks: tuple[RankSample, ...]
    """Sorted by rank, each rank at most once."""
    prompt_tokens: int | None = None
    """Prompt tokens that the engine has counted since its start; None if the page has no such count."""
    uncached_prompt_tokens: int | None = None
    """The same without cached tokens; ``/v1/loads`` has it from 0.5.17 on."""
    cached_prompt_tokens: int | None = None
    """Prompt tokens since its start that the engine had in its prefix cache, on pages with ``prompt_tokens``."""
    unpublished_ranks: tuple[int, ...] = ()
    """Ranks on the page that have not published a load yet. Sorted; none of them is in ``ranks``."""
    version: Version | None = None
    """The release of the engine that printed the page; None if the page does not report it."""
    mode: Mode | None = None
    """The present mode of its ranks; None if the page does not report it, or not the same for all."""


@dataclass(slots=True)
class LoadState:
    """What reading the load of one engine carries from one round to the next."""

    configured: LoadSource
    source: LoadSource = LoadSource.LOADS
    """Which page is read for the load at present: ``LOADS`` or ``METRICS``."""
    prompt_tokens_due: float = -math.inf
    """When the count of prompt tokens is to be read next, in monotonic seconds."""

    def __post_init__(self) -> None:
        if self.configured is LoadSource.METRICS:
            self.source = LoadSource.METRICS


WRONG_MODE: Final = "wrong_mode"
"""Code of the diagnostic of an engine whose mode does not fit its role. It is a disagreement as well."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A known problem of an engine's release or setup."""

    code: str
    """Stable name, for documentation and tests."""
    effect: str
    remedy: str
    unusable: bool = False
    """Whether no request can be served, or none in the way that is configured."""
