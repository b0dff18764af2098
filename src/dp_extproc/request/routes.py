"""The table of all routes of the engines' HTTP interfaces, and what happens to a request on each of them.

The rows come from ``http_server.py`` and its routers in SGLang 0.4.6 to 0.5.23, and from the routers of vLLM 0.33.
``docs/engines/routes.md`` shows the same table, and a test compares the two.
"""

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final


class Api(StrEnum):
    """The request formats that have routing fields."""

    GENERATE = "/generate"
    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


class Treatment(StrEnum):
    """What happens to a request on a route."""

    ROUTED = "routed"
    """It is scheduled on an endpoint and a rank."""
    PASSED = "passed"
    """Any engine of the pool answers; of a disaggregated pool a decode engine."""
    AGGREGATED = "passed, aggregated"
    """Any engine of an aggregated pool answers. A disaggregated pool refuses it."""
    ANSWERED = "answered"
    """The service itself answers."""
    REFUSED = "refused"
    """It reaches no engine."""


class Cause(Enum):
    """Why a route is refused, as the client reads it."""

    CONTROL = "changes or stops the engine that gets it, so it is sent to no engine from here; call each engine itself"
    ONE_ENGINE = "is about one engine, and there may be many behind this address; ask each engine itself"
    STORED = "needs the one engine that has stored what it names, and is sent to no engine from here"
    SOCKET = "is a WebSocket, which is not routed here"


@dataclass(frozen=True, slots=True)
class Route:
    """A path of an engine with the methods that it takes. A path that ends with a slash is the start of a path."""

    path: str
    methods: tuple[str, ...]
    treatment: Treatment
    cause: Cause | None = None
    by_model: bool = False
    """Whether the pool is that of the ``model`` in the body."""

    @property
    def takes(self) -> frozenset[str]:
        """The methods, with HEAD for each GET."""
        return frozenset(self.methods) | ({"HEAD"} if "GET" in self.methods else frozenset())


_GET: Final = ("GET",)
_POST: Final = ("POST",)
_PUT_TOO: Final = ("POST", "PUT")
_BOTH: Final = ("GET", "POST")

MODELS: Final = Route("/v1/models", _GET, Treatment.ANSWERED)
ONE_MODEL: Final = Route("/v1/models/", _GET, Treatment.ANSWERED)
"""The start of a path that asks for one model."""
ABORT: Final = Route("/abort_request", _POST, Treatment.ANSWERED)
"""The path that ends a request by the id that its client has given."""
_INFERENCE: Final = (
    Route(Api.GENERATE, _PUT_TOO, Treatment.ROUTED),
    *(Route(api, _POST, Treatment.ROUTED) for api in Api if api is not Api.GENERATE),
)

_TEXTS: Final = (
    "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", "/v1/messages/count_tokens", "/api/show",
    "/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render", "/v1/responses/render",
    "/cohere/v2/chat/render", "/v1/chat/completions/derender", "/v1/completions/derender",
)  # fmt: skip
"""Paths that work on texts and tokens of a model, and give the scheduler of the engine nothing to do."""
_PARSERS: Final = ("/parse_function_call", "/separate_reasoning")
"""Paths that parse a text. The body names a parser, and no model."""
_PAGES: Final = (
    "/", "/health", "/health_generate", "/ready", "/readyz", "/version", "/model_info", "/get_model_info",
    "/server_info", "/get_server_info", "/weight_version", "/get_weight_version", "/tokenizer_info", "/api/tags",
    "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc",
)  # fmt: skip
"""Pages that are alike on all engines of a pool."""

_WITHOUT_ROOM: Final = (
    "/v1/embeddings", "/v1/classify", "/v1/score", "/v1/decisions", "/v1/systemone", "/v1/audio/transcriptions",
    "/v1/audio/translations", "/api/chat", "/api/generate", "/vertex_generate", "/invocations", "/generate_from_file",
    "/pooling", "/score", "/rerank", "/v2/rerank", "/v2/embed", "/generative_scoring", "/cohere/v2/chat",
    "/v1/chat/completions/batch", "/inference/v1/generate",
)  # fmt: skip
"""Paths whose handlers give the scheduler a request without a bootstrap room."""
_WITHOUT_ROOM_PUT: Final = ("/encode", "/classify", "/v1/rerank")
"""The same, where SGLang takes PUT, too."""

_CONTROL: Final = (
    "/set_internal_state", "/add_external_corpus", "/remove_external_corpus", "/hicache/storage-backend/clear",
    "/update_weights_from_disk", "/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance",
    "/init_weights_update_group", "/destroy_weights_update_group", "/update_weights_from_tensor",
    "/begin_weight_update", "/end_weight_update", "/update_weights_from_distributed", "/update_weights_from_ipc",
    "/update_weight_version", "/pd_role_switch", "/load_lora_adapter", "/load_lora_adapter_from_tensors",
    "/unload_lora_adapter", "/pause_generation", "/continue_generation", "/scale_elastic_ep",
    "/scheduler_receive_url", "/scheduler_receive_meta_data", "/send", "/dumper/", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/abort_requests", "/inference/v1/abort_requests", "/collective_rpc",
    "/fault_tolerance/apply", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
    "/start_weight_update", "/start_draft_weight_update", "/finish_weight_update", "/update_weights",
    "/weight_checker", "/pause", "/resume", "/sleep", "/wake_up", "/release_kv_cache_memory", "/reset_encoder_cache",
    "/reset_mm_cache", "/reset_prefix_cache",
)  # fmt: skip
"""Paths that change, pause or stop an engine, with POST."""
_CONTROL_BY_GET: Final = (
    "/flush_cache", "/clear_hicache_storage_backend", "/start_profile", "/stop_profile", "/set_trace_level",
    "/freeze_gc", "/start_expert_distribution_record", "/stop_expert_distribution_record",
    "/dump_expert_distribution_record", "/get_weights_by_name", "/release_memory_occupation",
    "/resume_memory_occupation", "/weights_checker", "/slow_down", "/configure_logging", "/open_session",
    "/close_session",
)  # fmt: skip
"""The same, where SGLang takes GET, too."""

_ONE_ENGINE: Final = (
    "/metrics", "/v1/loads", "/get_load", "/load", "/is_sleeping", "/is_paused", "/weight_info", "/get_world_size",
    "/kv_event_sources", "/fault_tolerance/status", "/list_external_corpora", "/get_hicache_l3_cache_layout",
    "/get_remote_instance_transfer_engine_info", "/remote_instance_transfer_engine_info",
)  # fmt: skip
"""Pages with the state of one engine."""

ROUTES: Final = (
    *_INFERENCE,
    MODELS,
    ONE_MODEL,
    ABORT,
    *(Route(path, _POST, Treatment.PASSED, by_model=True) for path in _TEXTS),
    *(Route(path, _POST, Treatment.PASSED) for path in _PARSERS),
    *(Route(path, _GET, Treatment.PASSED) for path in _PAGES),
    Route("/ping", _BOTH, Treatment.PASSED),
    *(Route(path, _POST, Treatment.AGGREGATED, by_model=True) for path in _WITHOUT_ROOM),
    *(Route(path, _PUT_TOO, Treatment.AGGREGATED, by_model=True) for path in _WITHOUT_ROOM_PUT),
    *(Route(path, _POST, Treatment.REFUSED, Cause.CONTROL) for path in _CONTROL),
    *(Route(path, _BOTH, Treatment.REFUSED, Cause.CONTROL) for path in _CONTROL_BY_GET),
    Route("/hicache/storage-backend", ("GET", "PUT", "DELETE"), Treatment.REFUSED, Cause.CONTROL),
    *(Route(path, _GET, Treatment.REFUSED, Cause.ONE_ENGINE) for path in _ONE_ENGINE),
    Route("/is_scaling_elastic_ep", _BOTH, Treatment.REFUSED, Cause.ONE_ENGINE),
    Route("/v1/responses/", _BOTH, Treatment.REFUSED, Cause.STORED),
    Route("/v1/files", _POST, Treatment.REFUSED, Cause.STORED),
    Route("/v1/files/", ("GET", "DELETE"), Treatment.REFUSED, Cause.STORED),
    Route("/v1/batches", _POST, Treatment.REFUSED, Cause.STORED),
    Route("/v1/batches/", _BOTH, Treatment.REFUSED, Cause.STORED),
    Route("/v1/realtime", _GET, Treatment.REFUSED, Cause.SOCKET),
)

_BY_PATH: Final = {route.path: route for route in ROUTES}
_STARTS: Final = tuple(route for route in ROUTES if len(route.path) > 1 and route.path.endswith("/"))


def find_route(path: str) -> Route | None:
    """Return the route of a path without its query; None if no engine has it."""
    found = _BY_PATH.get(path)
    return found or next((route for route in _STARTS if path.startswith(route.path)), None)
