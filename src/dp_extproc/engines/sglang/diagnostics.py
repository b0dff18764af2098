"""The known problems of SGLang releases and flags, as far as ``/server_info`` shows them. Pure.

A problem that this service works around is listed if the workaround costs something, or if requests that bypass the
service still meet it.
"""

from collections.abc import Iterator

from dp_extproc.config.load import LoadSource
from dp_extproc.engines.capabilities import RankControl
from dp_extproc.engines.model import MODE_OF, WRONG_MODE, Diagnostic, EngineFacts, Mode, Role
from dp_extproc.engines.sglang.capabilities import capabilities
from dp_extproc.engines.sglang.releases import DISAGGREGATION, HEADER_APIS, NEWEST, Fields, RoomCheck, release_of
from dp_extproc.request.path import Api


def diagnostics(
    facts: EngineFacts, role: Role, *, needs_overrides: bool = False, headers_only: bool = False
) -> tuple[Diagnostic, ...]:
    """List the known problems of an engine in a role, the worst first.

    *needs_overrides* and *headers_only* are those of :class:`dp_extproc.engines.model.Endpoint`.
    """
    found = [*_of_any(facts, role), *_of_reading(facts, role)]
    if role is Role.WORKER:
        found += _of_worker(facts)
    else:
        found += _of_disaggregated(facts)
        found += _of_overrides(facts, headers_only=headers_only) if needs_overrides else ()
        found += _of_prefill(facts) if role is Role.PREFILL else _of_decode(facts)
    return tuple(sorted(found, key=lambda each: not each.unusable))


def _of_any(facts: EngineFacts, role: Role) -> Iterator[Diagnostic]:
    if facts.mode is not MODE_OF[role]:
        yield Diagnostic(
            WRONG_MODE,
            f"its disaggregation_mode is {facts.mode}, but it stands under {role}: requests fail or wait for a peer "
            "that never comes",
            f"start it with --disaggregation-mode {MODE_OF[role]}, or move it in the configuration",
            unusable=True,
        )
    if facts.version is None:
        yield Diagnostic(
            "unknown_version",
            "its version names no release, as of a build from source; it is treated like the newest one known here, "
            f"{NEWEST} and later",
            "nothing, if it is as new as that; else use a released SGLang of 0.5.11 or later",
        )
    if facts.role_can_switch:
        yield Diagnostic(
            "role_can_switch",
            "--enable-pd-role-switch lets it change its role; requests of the old one fail until its load is read",
            "leave the flag out, or move the engine in the configuration together with each switch",
        )
    if not release_of(facts.version).ends_closed and role is not Role.PREFILL:
        yield Diagnostic(
            "closed_streams_run_on",
            "0.5.18 and 0.5.19 compute a streamed request to max_tokens although its client has left",
            "upgrade to 0.5.20 or later (or stay at 0.5.17), which end such requests at once",
        )
    if release_of(facts.version).fields is Fields.NONE and facts.dp_ranks > 1:
        yield Diagnostic(
            "foreign_rank_is_fatal",
            "a rank out of range in a request that goes past this router ends the whole server",
            "let nobody but this router reach it, or upgrade to 0.5.10 or later, which checks the range",
        )


def _of_reading(facts: EngineFacts, role: Role) -> Iterator[Diagnostic]:
    if release_of(facts.version).load is LoadSource.METRICS:
        if facts.metrics_enabled is False:
            yield Diagnostic(
                "no_load_source",
                "it has neither /v1/loads (from 0.5.8 on) nor /metrics: only what this router sent it is known",
                "start it with --enable-metrics",
            )
        else:
            yield Diagnostic(
                "load_lags",
                "without /v1/loads (from 0.5.8 on) its load comes from /metrics, which has no queued tokens, lags "
                "(decode: every 40 steps) and stands still while requests wait for the other side",
                "upgrade to 0.5.13 or later",
            )
    elif facts.metrics_enabled is False and role is not Role.DECODE:
        yield Diagnostic(
            "metrics_off",
            "without /metrics its prompt tokens are not counted, and text lengths stay estimates of 4 bytes per token",
            "start it with --enable-metrics",
        )


def _of_worker(facts: EngineFacts) -> Iterator[Diagnostic]:
    if facts.dp_ranks == 1:
        return
    takes = capabilities(facts)
    if uncontrolled := [api for api in Api if takes.aggregated_rank_key(api) is None]:
        yield Diagnostic(
            "rank_not_carried",
            f"its release takes no rank on {', '.join(uncontrolled)}: the engine itself picks there",
            "upgrade to 0.5.22 or later, which takes it on every path",
        )
    if facts.follows_rooms:
        yield Diagnostic(
            "worker_follows_rooms",
            "it dispatches by bootstrap_room, and a request that has none and no rank ends the whole server",
            "start it without --load-balance-method follow_bootstrap_room",
            unusable=True,
        )


def _of_disaggregated(facts: EngineFacts) -> Iterator[Diagnostic]:
    if not release_of(facts.version).paths:
        yield Diagnostic(
            "too_old",
            "its release takes no bootstrap fields over HTTP",
            f"upgrade to {DISAGGREGATION} at least; 0.5.16 or later is best",
            unusable=True,
        )
        return
    takes = capabilities(facts)
    if refused := [api for api in Api if not takes.serves(api)]:
        yield Diagnostic(
            "paths_refused",
            f"its release drops the bootstrap fields on {', '.join(refused)}: such requests are refused with 400",
            "upgrade to 0.5.20 for /v1/responses, to 0.5.22 for /v1/messages",
        )


def _of_overrides(facts: EngineFacts, *, headers_only: bool) -> Iterator[Diagnostic]:
    instead = "no request can be sent to it" if headers_only else "ranks and rooms are carried in bodies"
    if facts.reads_overrides is False:
        leave = "write another envoy.body_mode" if headers_only else "leave routing_fields out"
        yield Diagnostic(
            "overrides_not_read",
            f"routing_fields: headers is configured, but it does not obey x-override-* headers: {instead}",
            f"start it with SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1 (0.5.15 or later; from 0.5.18 on for chat), or "
            f"{leave}",
            unusable=True,
        )
        return
    if facts.reads_overrides is None:
        yield Diagnostic(
            "overrides_unknown",
            f"it has not told whether it obeys x-override-* headers: until it does, {instead}",
            "see why it does not answer POST /generate; it is asked again every few seconds",
            unusable=headers_only,
        )
        return
    takes = capabilities(facts)
    if unread := [api for api in Api if api in HEADER_APIS - takes.overrides_on and takes.serves(api)]:
        instead = "such requests are refused with 400" if headers_only else "there bodies carry ranks and rooms"
        yield Diagnostic(
            "overrides_not_on_chat",
            f"its release obeys x-override-* headers on /generate alone, not on {', '.join(unread)}: {instead}",
            "upgrade to 0.5.18 or later",
            unusable=headers_only,
        )
    if headers_only:
        lost = ", ".join(api for api in Api if api not in HEADER_APIS)
        yield Diagnostic(
            "paths_without_bodies",
            f"no release obeys x-override-* headers on {lost}: such requests are refused with 400",
            "write another envoy.body_mode if they are needed",
        )


def _of_prefill(facts: EngineFacts) -> Iterator[Diagnostic]:
    if facts.dp_ranks == 1:
        return
    skips_room_check = release_of(facts.version).room_check is RoomCheck.SKIPPED
    if capabilities(facts).only_first_prefill_rank:
        yield Diagnostic(
            "plain_dp_first_rank_only",
            f"plain DP: every replica takes itself for rank 0, so only rank 0 of {facts.dp_ranks} can serve and the "
            "others stay idle",
            "start it with --enable-dp-attention, or upgrade to 0.5.16 or later",
        )
    elif facts.mode is Mode.PREFILL and facts.follows_rooms and not facts.dp_attention and skips_room_check:
        yield Diagnostic(
            "plain_dp_needs_rank_on_both_legs",
            "plain DP: requests for ranks other than 0 that go past this router fail unless both legs carry "
            "disagg_prefill_dp_rank, as this router's do",
            "let only this router reach it, or start it with --enable-dp-attention",
        )
    if facts.follows_rooms:
        yield Diagnostic(
            "roomless_is_fatal",
            "a request that goes past this router with neither room nor rank ends the whole server",
            "let nobody but this router reach it, health checks included (use /ready or /health)",
        )
    elif not skips_room_check:
        yield Diagnostic(
            "registers_each_request",
            f"with --load-balance-method {facts.load_balance_method} its scheduler stops for an HTTP call per request",
            "start it without --load-balance-method, or upgrade to 0.5.16 or later",
        )


def _of_decode(facts: EngineFacts) -> Iterator[Diagnostic]:
    takes = capabilities(facts)
    if takes.takes_routed_rank and not takes.takes_prefill_rank:
        yield Diagnostic(
            "prefill_rank_left_out",
            "0.5.10 fails the first request of each pair of servers that names the prefill rank; it is left out, and "
            "a prefill server with another method than follow_bootstrap_room is asked for it each time",
            "upgrade to 0.5.11 or later",
        )
    if facts.dp_ranks == 1:
        return
    if takes.decode_control is RankControl.ENGINE:
        yield Diagnostic(
            "decode_rank_not_controllable",
            "0.5.8 and 0.5.9 spread requests over decode ranks in turn; no request can choose",
            "start it with --load-balance-method follow_bootstrap_room, or upgrade to 0.5.10 or later",
        )
    elif takes.decode_control is RankControl.BY_ROOM:
        yield Diagnostic(
            "ranks_coupled_by_room",
            "one room decides the ranks of both servers: with as many decode ranks as prefill ranks they are always "
            "the same, else equal modulo the greatest common divisor of the two numbers",
            "upgrade to 0.5.10 or later",
        )
