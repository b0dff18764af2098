"""Reads ``GET /server_info`` (``/get_server_info`` before 0.5.6): the resolved launch arguments of an SGLang engine."""

from typing import Any, Final

from msgspec import UNSET, Raw, Struct, UnsetType

from dp_extproc.engines.model import DEFAULT_STEP_TOKENS, EngineFacts, Mode, PairTerms, Version, parse_version
from dp_extproc.engines.pages import read_json, wrong_shape
from dp_extproc.engines.quantities import MAX_RANKS, Count, Port, Ranks, SignedCount, impossible
from dp_extproc.engines.sglang.releases import Methods, release_of

FACTS_PAGE: Final = "/server_info"
OLD_FACTS_PAGE: Final = "/get_server_info"
"""The name of the same page before 0.5.6."""
DEFAULT_BOOTSTRAP_PORT: Final = 8998
"""SGLang's default of ``--disaggregation-bootstrap-port``."""

_FOLLOW_ROOMS: Final = "follow_bootstrap_room"
"""The ``--load-balance-method`` that picks the rank ``bootstrap_room mod ranks``."""
_LARGEST_PAGE: Final = 1 << 20
"""Bound for the tokens of a KV cache page. SGLang's own defaults end at 128."""
_LONGEST_NAME: Final = 200
"""Bound for the characters of a text that is logged or sent to clients."""


class _Page(Struct):
    dp_size: Ranks
    attn_dp_size: Ranks | None = None
    version: Any = None
    """Any JSON: the rest of the page counts also with a malformed version."""
    disaggregation_mode: str | None = None
    disaggregation_bootstrap_port: Port | None = None
    enable_dp_attention: bool | None = None
    enable_metrics: bool | None = None
    enable_pd_role_switch: bool | None = None
    load_balance_method: str | None = None
    served_model_name: str | None = None
    model_path: str | None = None
    chunked_prefill_size: SignedCount | None = None
    """-1 if prompts are not split."""
    max_prefill_tokens: Count | None = None
    disable_radix_cache: bool | None = None
    page_size: Any = None
    kv_cache_dtype: Any = None
    disaggregation_transfer_backend: Any = None
    enable_hisparse: Any = None
    tp_size: Any = None
    pp_size: Any = None
    attn_cp_size: Any = None
    internal_states: Raw | UnsetType = UNSET


class _State(Struct):
    disaggregation_mode: str | None = None


def read_server_info(page: bytes) -> EngineFacts:
    """Read the body of ``GET /server_info``, or raise :class:`dp_extproc.engines.pages.ReaderError`."""
    info = read_json(page, _Page, FACTS_PAGE)
    # From 0.5.22 on ``--dp-size 4 --enable-dp-attention`` reads as dp_size 1 and attn_dp_size 4 (parallel_hook.py).
    ranks = info.dp_size * (info.attn_dp_size or 1)
    if ranks > MAX_RANKS:
        raise impossible(ranks, FACTS_PAGE, "its number of DP ranks")
    version = parse_version(info.version)
    mode = _mode(_present_role(info))
    return EngineFacts(
        version=version,
        dp_ranks=ranks,
        mode=mode,
        dp_attention=bool(info.enable_dp_attention),
        served_model=info.served_model_name or info.model_path,
        bootstrap_port=info.disaggregation_bootstrap_port or DEFAULT_BOOTSTRAP_PORT,
        load_balance_method=info.load_balance_method,
        follows_rooms=follows_rooms(version, mode, info.load_balance_method),
        metrics_enabled=info.enable_metrics,
        role_can_switch=bool(info.enable_pd_role_switch),
        step_tokens=_step_tokens(info),
        chunked=info.chunked_prefill_size is None or info.chunked_prefill_size > 0,
        prefix_cache=not info.disable_radix_cache,
        terms=_terms(info, ranks),
    )


def follows_rooms(version: Version | None, mode: Mode, method: str | None) -> bool:
    """Return whether an engine picks the rank ``bootstrap_room mod ranks`` (``managers/data_parallel_controller.py``).

    A *method* (``load_balance_method``) of None or ``auto`` is the default of the release.
    """
    methods = release_of(version).methods
    if methods is Methods.NONE:
        return mode is not Mode.UNIFIED
    if methods is Methods.DECODE and mode is Mode.PREFILL:
        return True
    if method in {None, "auto"}:
        return mode is Mode.PREFILL
    return method == _FOLLOW_ROOMS


def _step_tokens(info: _Page) -> int:
    """Return the prompt tokens per rank and step. With DP attention the page has them divided by the ranks already."""
    if info.chunked_prefill_size is not None and info.chunked_prefill_size > 0:
        return info.chunked_prefill_size
    return max(1, info.max_prefill_tokens or DEFAULT_STEP_TOKENS)  # without chunks a step has whole prompts


def _terms(info: _Page, ranks: int) -> PairTerms:
    """Read the settings on which a pair has to agree. A malformed one is left out, and the rest of the page counts."""
    size = info.page_size
    # With HiSparse a decode engine uses pages of another size than it reports.
    is_usable = type(size) is int and 1 <= size <= _LARGEST_PAGE and not info.enable_hisparse
    path, name = _name(info.model_path), _name(info.served_model_name)
    return PairTerms(
        page_size=size if is_usable else None,
        kv_cache_dtype=_name(info.kv_cache_dtype),
        transfer_backend=_name(info.disaggregation_transfer_backend),
        model_path=path,
        served_name=None if name == path else name,
        pp_size=_size(info.pp_size),
        attn_tp_size=_attn_tp_size(info, ranks),
    )


def _attn_tp_size(info: _Page, ranks: int) -> int | None:
    """Return ``tp_size``, divided by the DP ranks with DP attention and by the context-parallel ranks."""
    size, others = _size(info.tp_size), _size(info.attn_cp_size) or 1
    divisor = others * (ranks if info.enable_dp_attention else 1)
    return size // divisor if size is not None and size % divisor == 0 else None


def _size(value: Any) -> int | None:
    return value if type(value) is int and 1 <= value <= MAX_RANKS else None


def _name(value: Any) -> str | None:
    """Accept a name that fits on one line of a log and of an error."""
    return value if isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable() else None


def _present_role(info: _Page) -> str | None:
    """Return the present role. With ``--enable-pd-role-switch`` the launch arguments have only the first one."""
    if info.enable_pd_role_switch and isinstance(info.internal_states, Raw):
        states = read_json(bytes(info.internal_states), list[_State], "/server_info internal_states")
        if states and states[0].disaggregation_mode is not None:
            return states[0].disaggregation_mode
    return info.disaggregation_mode


def _mode(text: str | None) -> Mode:
    try:
        return Mode(text or "null")
    except ValueError:
        raise wrong_shape(f"/server_info tells the unknown disaggregation_mode {(text or '')[:40]!r}") from None
