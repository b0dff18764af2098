"""Define the options of an engine."""

from dataclasses import dataclass, field
from enum import StrEnum

from dp_extproc.lab.engine.release import Release
from dp_extproc.lab.engine.scheduler.costs import Costs
from dp_extproc.lab.engine.scheduler.rank import Limits
from dp_extproc.lab.engine.scheduler.work import Role


@dataclass(frozen=True, slots=True)
class Timeouts:
    """SGLang's constants, in seconds of an unscaled engine."""

    bootstrap: float = 300.0
    """``SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT``: prefill waits for decode."""
    waiting: float = 300.0
    """``SGLANG_DISAGGREGATION_WAITING_TIMEOUT``: decode waits for the KV cache."""
    bootstrap_tries: int = 15
    """Tries of decode to reach the bootstrap server (``disaggregation/decode.py``)."""
    bootstrap_pause: float = 1.0
    """Seconds between two of these tries."""
    bootstrap_answer: float = 5.0
    """Seconds that each of these tries may take. Real seconds: ``--time-scale`` makes no network faster."""
    heartbeat: float = 5.0
    """``SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL``; after two misses a prefill engine counts as lost."""
    disconnect_poll: float = 4.0
    """``SGLANG_REQUEST_STATE_WAIT_TIMEOUT``: how often a waiting request checks whether its client is still there."""
    background_abort: float = 2.0
    """Seconds after the end of a streaming response (``create_abort_task`` of the tokenizer manager)."""
    health: float = 1.0
    """Seconds that /health waits before it looks for the token of its probe."""


class EngineKind(StrEnum):
    """The kind of engine whose contract is kept."""

    SGLANG = "sglang"
    VLLM = "vllm"


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM with which the API port serves TLS (``--ssl-certfile`` and ``--ssl-keyfile`` of SGLang)."""

    cert: str
    key: str | None = None
    """None if the key is in the file of the certificate."""
    client_ca: str | None = None
    """CA bundle of the certificates that clients must have; None if they need none."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The resolved options of an engine; times are unscaled."""

    kind: EngineKind = EngineKind.SGLANG
    role: Role = Role.UNIFIED
    dp_size: int = 1
    port: int = 30000
    host: str = "127.0.0.1"
    bootstrap_port: int = 8998
    debug_port: int | None = None
    release: Release = field(default_factory=lambda: Release(0, 5, 23))
    vllm_version: str = "0.11.0"
    model: str = "strict-engine"
    dp_attention: bool = False
    attn_tp_size: int = 1
    load_balance_method: str = "auto"
    enable_metrics: bool = True
    header_overrides: bool = False
    force_query: bool = False
    """``SGLANG_DISAGGREGATION_FORCE_QUERY_PREFILL_DP_RANK``: prefill registers ranks, decode queries them."""
    role_switch: bool = False
    """``--enable-pd-role-switch``: ``POST /pd_role_switch`` changes what the pages report as the role."""
    warm_up: float = 0.0
    """Seconds after the start in which ``/ready`` and ``/health`` answer 503, while pages answer."""
    rank_listeners: bool = False
    """``SGLANG_RUST_SERVER``: each rank has a listener of its own, at ``port`` plus the rank."""
    api_key: str | None = None
    tls: Tls | None = None
    """TLS of the API port and of the listeners of ranks. The bootstrap server and the debug port have none."""
    context_length: int = 1 << 25
    capacity: int = 1 << 25
    max_running_requests: int = 256
    chunked_prefill_size: int = 8192
    max_prefill_tokens: int = 16384
    reserved_decode_tokens: int = 512
    decode_log_interval: int = 40
    stream_interval: int = 1
    vocabulary_size: int = 1 << 31
    """Token ids that the embedding has a row for. The default is larger than that of any model."""
    page_size: int = 1
    """Tokens of a KV cache page. It is only reported, and compared by the two sides: here pages have one token."""
    kv_cache_dtype: str = "auto"
    transfer_backend: str = "mooncake"
    disable_radix_cache: bool = False
    enable_cache_report: bool = False
    lora_adapters: tuple[str, ...] = ()
    """Names of the adapters (LoRA) that it lists. Here they change no token."""
    drain: float | None = None
    """Seconds between two looks after SIGTERM whether a request runs; None: it ends immediately."""
    time_scale: float = 1.0
    timeouts: Timeouts = field(default_factory=Timeouts)
    costs: Costs = field(default_factory=Costs)

    @property
    def max_input(self) -> int:
        """Return SGLang's ``max_req_input_len``: a prompt of so many tokens is rejected (``managers/tp_worker.py``)."""
        return min(self.context_length - 1, self.capacity - 1) - 5

    @property
    def method(self) -> str:
        """Return the load balance method after SGLang has resolved ``auto`` (``arg_groups/serving_hook.py``)."""
        if self.role is Role.PREFILL and self.release.prefill_always_follows_rooms:
            return "follow_bootstrap_room"
        if self.load_balance_method != "auto":
            return self.load_balance_method
        return "follow_bootstrap_room" if self.role is Role.PREFILL else "round_robin"

    @property
    def follows_rooms(self) -> bool:
        """Whether the engine picks ranks by ``bootstrap_room mod ranks``."""
        if not self.release.balances:
            return self.role is not Role.UNIFIED
        return self.method == "follow_bootstrap_room"

    @property
    def caches_prefixes(self) -> bool:
        """Whether ranks keep what they have computed; decode engines do not by default (the option is not modelled)."""
        return not self.disable_radix_cache and self.role is not Role.DECODE

    @property
    def limits(self) -> Limits:
        """Return the limits of one rank: DP attention divides the engine's numbers, replicas each have all of them."""
        share = self.dp_size if self.dp_attention else 1
        return Limits(
            capacity=self.capacity,
            max_running=max(1, self.max_running_requests // share),
            chunk=self.rank_chunk,
            batch=self.max_prefill_tokens,
            reserved=self.reserved_decode_tokens,
        )

    @property
    def rank_chunk(self) -> int:
        """Return the prompt tokens per rank and step; 0 for no chunks (``--chunked-prefill-size -1``)."""
        if self.chunked_prefill_size <= 0:
            return 0
        return max(1, self.chunked_prefill_size // (self.dp_size if self.dp_attention else 1))

    def scheduler_rank(self, dp_rank: int) -> int:
        """Return the number of a rank's scheduler in error texts: its tensor-parallel rank in its replica."""
        return dp_rank * self.attn_tp_size if self.dp_attention else 0
