"""What SGLang releases support, and their known problems, row by row."""

from dataclasses import replace

import pytest

from dp_extproc.engines.capabilities import RankControl
from dp_extproc.engines.model import EngineFacts, Mode, Role, parse_version
from dp_extproc.engines.sglang.capabilities import capabilities
from dp_extproc.engines.sglang.diagnostics import diagnostics
from dp_extproc.engines.sglang.server_info import follows_rooms
from dp_extproc.request.path import Api

EARLY = {Api.GENERATE, Api.COMPLETIONS, Api.CHAT}


def facts(
    version: str | None,
    mode: Mode,
    *,
    ranks: int = 4,
    method: str | None = "auto",
    attention: bool = True,
    metrics: bool | None = True,
    switch: bool = False,
) -> EngineFacts:
    release = parse_version(version)
    return EngineFacts(
        version=release,
        dp_ranks=ranks,
        mode=mode,
        dp_attention=attention,
        served_model="m",
        bootstrap_port=8998,
        load_balance_method=method,
        follows_rooms=follows_rooms(release, mode, method),
        metrics_enabled=metrics,
        role_can_switch=switch,
    )


@pytest.mark.parametrize(
    ("version", "routed", "prefill_rank"),
    [
        ("0.4.6", False, False),
        ("0.5.7", False, False),
        ("0.5.8", False, False),
        ("0.5.9", False, False),
        ("0.5.10", True, False),
        ("0.5.10.post1", True, False),
        ("0.5.11", True, True),
        ("0.5.15", True, True),
        ("0.5.16", True, True),
        ("0.5.23", True, True),
        (None, True, True),
    ],
)
@pytest.mark.parametrize("mode", list(Mode))
def test_rank_fields_depend_on_the_release_alone(
    mode: Mode, version: str | None, routed: bool, prefill_rank: bool
) -> None:
    """They are the same in every role."""
    takes = capabilities(facts(version, mode))

    assert (takes.takes_routed_rank, takes.takes_prefill_rank) == (routed, prefill_rank)


@pytest.mark.parametrize(
    ("version", "method", "control"),
    [
        pytest.param("0.4.6", "round_robin", RankControl.BY_ROOM, id="0.4.6"),
        pytest.param("0.5.7", "round_robin", RankControl.BY_ROOM, id="0.5.7"),
        pytest.param("0.5.8", "auto", RankControl.ENGINE, id="0.5.8"),
        pytest.param("0.5.9", "round_robin", RankControl.ENGINE, id="0.5.9"),
        pytest.param("0.5.9", "follow_bootstrap_room", RankControl.BY_ROOM, id="0.5.9-follows"),
        pytest.param("0.5.10", "round_robin", RankControl.BY_FIELD, id="0.5.10"),
        pytest.param("0.5.23", "follow_bootstrap_room", RankControl.BY_FIELD, id="0.5.23-follows"),
        pytest.param(None, None, RankControl.BY_FIELD, id="unknown"),
    ],
)
def test_decode_rank_is_decided_by_release_and_method(
    version: str | None, method: str | None, control: RankControl
) -> None:
    """Old releases let the room or the engine decide."""
    assert capabilities(facts(version, Mode.DECODE, method=method)).decode_control is control


@pytest.mark.parametrize(
    ("version", "method", "attention", "usable"),
    [
        pytest.param("0.5.9", "auto", False, 4, id="0.5.9-plain"),
        pytest.param("0.5.10", "auto", False, 4, id="0.5.10-plain"),
        pytest.param("0.5.10", "round_robin", False, 1, id="0.5.10-plain-round-robin"),
        pytest.param("0.5.11", "auto", False, 1, id="0.5.11-plain"),
        pytest.param("0.5.15", "follow_bootstrap_room", False, 1, id="0.5.15-plain"),
        pytest.param("0.5.15", "round_robin", False, 4, id="0.5.15-plain-round-robin"),
        pytest.param("0.5.15", "auto", True, 4, id="0.5.15-attention"),
        pytest.param("0.5.16", "auto", False, 4, id="0.5.16-plain"),
        pytest.param("0.5.23", "auto", False, 4, id="0.5.23-plain"),
        pytest.param(None, "auto", False, 4, id="unknown-plain"),
    ],
)
def test_plain_dp_serves_the_first_rank_alone_in_some_releases(
    version: str | None, method: str, attention: bool, usable: int
) -> None:
    """These are 0.5.11 to 0.5.15 with rooms, and 0.5.10 without."""
    takes = capabilities(facts(version, Mode.PREFILL, method=method, attention=attention))

    assert list(takes.prefill_ranks(4)) == list(range(usable))


@pytest.mark.parametrize(
    ("version", "served"),
    [
        ("0.4.5", set[Api]()),
        ("0.4.6", EARLY),
        ("0.5.19", EARLY),
        ("0.5.20", EARLY | {Api.RESPONSES}),
        ("0.5.21", EARLY | {Api.RESPONSES}),
        ("0.5.22", set(Api)),
        (None, set(Api)),
    ],
)
@pytest.mark.parametrize("mode", [Mode.PREFILL, Mode.DECODE])
def test_disaggregated_pools_serve_paths_with_bootstrap_fields(
    mode: Mode, version: str | None, served: set[Api]
) -> None:
    """Each release has the fields on more paths."""
    takes = capabilities(facts(version, mode))

    assert {api for api in Api if takes.serves(api)} == served


@pytest.mark.parametrize(
    ("version", "generate", "openai", "responses", "messages"),
    [
        ("0.4.6", None, None, None, None),
        ("0.4.7", "data_parallel_rank", None, None, None),
        ("0.5.6", "data_parallel_rank", None, None, None),
        ("0.5.7", "data_parallel_rank", "data_parallel_rank", None, None),
        ("0.5.9", "data_parallel_rank", "data_parallel_rank", None, None),
        ("0.5.10", "routed_dp_rank", "routed_dp_rank", None, None),
        ("0.5.16", "routed_dp_rank", "routed_dp_rank", None, None),
        ("0.5.20", "routed_dp_rank", "routed_dp_rank", "routed_dp_rank", None),
        ("0.5.22", "routed_dp_rank", "routed_dp_rank", "routed_dp_rank", "routed_dp_rank"),
        (None, "routed_dp_rank", "routed_dp_rank", "routed_dp_rank", "routed_dp_rank"),
    ],
)
def test_aggregated_pools_name_the_rank_by_release_and_path(
    version: str | None, generate: str | None, openai: str | None, responses: str | None, messages: str | None
) -> None:
    """Every path is served, also without a field for the rank."""
    takes = capabilities(facts(version, Mode.UNIFIED))

    assert [takes.aggregated_rank_key(api) for api in Api] == [generate, openai, openai, responses, messages]
    assert all(takes.serves(api) for api in Api)


@pytest.mark.parametrize(
    ("version", "reads", "apis"),
    [
        ("0.5.14", True, set[Api]()),
        ("0.5.15", True, {Api.GENERATE}),
        ("0.5.17", True, {Api.GENERATE}),
        ("0.5.18", True, {Api.GENERATE, Api.CHAT}),
        ("0.5.22", True, {Api.GENERATE, Api.CHAT, Api.MESSAGES}),
        ("0.5.23", False, set[Api]()),
        ("0.5.23", None, set[Api]()),
    ],
)
def test_override_headers_are_used_where_the_engine_obeys_them(
    version: str, reads: bool | None, apis: set[Api]
) -> None:
    """An engine that was probed and does not obey them has a diagnostic."""
    engine = replace(facts(version, Mode.DECODE), reads_overrides=reads)

    assert capabilities(engine).overrides_on == apis
    codes = {diagnostic.code for diagnostic in diagnostics(engine, Role.DECODE, needs_overrides=True)}
    assert ("overrides_not_read" in codes) == (reads is False)


@pytest.mark.parametrize("headers_only", [False, True], ids=["bodies have the rest", "there are no bodies"])
@pytest.mark.parametrize(
    ("version", "reads", "unusable", "others"),
    [
        ("0.5.15", True, {"overrides_not_on_chat"}, set()),
        ("0.5.17", True, {"overrides_not_on_chat"}, set()),
        ("0.5.18", True, set(), {"closed_streams_run_on"}),
        ("0.5.23", True, set(), set()),
        ("0.5.14", False, {"overrides_not_read"}, set()),
        ("0.5.23", False, {"overrides_not_read"}, set()),
        ("0.5.23", None, {"overrides_unknown"}, set()),
    ],
)
def test_diagnostics_of_override_headers_depend_on_bodies(
    version: str, reads: bool | None, unusable: set[str], others: set[str], headers_only: bool
) -> None:
    """Where bodies are not seen, an engine that needs them for routing fields cannot be used."""
    engine = replace(facts(version, Mode.DECODE), reads_overrides=reads)
    everything = diagnostics(engine, Role.DECODE, needs_overrides=True, headers_only=headers_only)
    found = [each for each in everything if each.code != "paths_refused"]
    codes = {each.code for each in found}

    assert codes - {"paths_without_bodies"} == unusable | others
    assert ("paths_without_bodies" in codes) == (headers_only and reads is True)
    assert {each.code for each in found if each.unusable} == (unusable if headers_only or reads is False else set())


PREFILL, DECODE, UNIFIED = Mode.PREFILL, Mode.DECODE, Mode.UNIFIED


@pytest.mark.parametrize(
    ("role", "engine", "codes"),
    [
        pytest.param(Role.PREFILL, facts("0.5.23", PREFILL), {"roomless_is_fatal"}, id="prefill"),
        pytest.param(Role.DECODE, facts("0.5.23", DECODE), set(), id="decode"),
        pytest.param(Role.WORKER, facts("0.5.23", UNIFIED), set(), id="worker"),
        pytest.param(
            Role.WORKER, facts("0.5.19", UNIFIED), {"rank_not_carried", "closed_streams_run_on"}, id="worker-0.5.19"
        ),
        pytest.param(
            Role.DECODE, facts("0.5.19", DECODE), {"paths_refused", "closed_streams_run_on"}, id="decode-0.5.19"
        ),
        pytest.param(Role.PREFILL, facts("0.5.23", PREFILL, ranks=1), set(), id="prefill-single"),
        pytest.param(Role.PREFILL, facts("0.5.23", PREFILL, method="total_tokens"), set(), id="prefill-total-tokens"),
        pytest.param(
            Role.PREFILL,
            facts("0.5.23", PREFILL, attention=False),
            {"roomless_is_fatal", "plain_dp_needs_rank_on_both_legs"},
            id="prefill-plain",
        ),
        pytest.param(
            Role.PREFILL,
            facts("0.5.15", PREFILL, attention=False),
            {"roomless_is_fatal", "plain_dp_first_rank_only", "paths_refused"},
            id="prefill-plain-0.5.15",
        ),
        pytest.param(
            Role.PREFILL,
            facts("0.5.15", PREFILL, method="round_robin"),
            {"registers_each_request", "paths_refused"},
            id="prefill-round-robin-0.5.15",
        ),
        pytest.param(
            Role.PREFILL,
            facts("0.5.9", PREFILL, method="round_robin"),
            {"roomless_is_fatal", "foreign_rank_is_fatal", "paths_refused"},
            id="prefill-forced-0.5.9",
        ),
        pytest.param(Role.PREFILL, facts("0.4.5", PREFILL, ranks=1), {"too_old", "load_lags"}, id="prefill-0.4.5"),
        pytest.param(
            Role.PREFILL, facts("0.5.23", PREFILL, ranks=1, metrics=False), {"metrics_off"}, id="prefill-no-metrics"
        ),
        pytest.param(Role.DECODE, facts("0.5.23", DECODE, metrics=False), set(), id="decode-no-metrics"),
        pytest.param(
            Role.DECODE, facts("0.5.10", DECODE), {"prefill_rank_left_out", "paths_refused"}, id="decode-0.5.10"
        ),
        pytest.param(
            Role.DECODE,
            facts("0.5.9", DECODE),
            {"decode_rank_not_controllable", "foreign_rank_is_fatal", "paths_refused"},
            id="decode-0.5.9",
        ),
        pytest.param(
            Role.DECODE,
            facts("0.5.9", DECODE, method="follow_bootstrap_room"),
            {"ranks_coupled_by_room", "foreign_rank_is_fatal", "paths_refused"},
            id="decode-0.5.9-follows",
        ),
        pytest.param(
            Role.DECODE,
            facts("0.5.7", DECODE, metrics=False),
            {"ranks_coupled_by_room", "foreign_rank_is_fatal", "paths_refused", "no_load_source"},
            id="decode-0.5.7",
        ),
        pytest.param(Role.DECODE, facts("0.5.21", DECODE), {"paths_refused"}, id="decode-0.5.21"),
        pytest.param(Role.DECODE, facts(None, DECODE), {"unknown_version"}, id="decode-unknown"),
        pytest.param(Role.DECODE, facts("0.5.23", DECODE, switch=True), {"role_can_switch"}, id="decode-switch"),
        pytest.param(Role.DECODE, facts("0.5.23", PREFILL), {"wrong_mode"}, id="decode-is-prefill"),
        pytest.param(Role.WORKER, facts("0.5.16", UNIFIED), {"rank_not_carried"}, id="worker-0.5.16"),
        pytest.param(Role.WORKER, facts("0.5.16", UNIFIED, ranks=1), set(), id="worker-single-0.5.16"),
        pytest.param(
            Role.WORKER,
            facts("0.5.23", UNIFIED, method="follow_bootstrap_room"),
            {"worker_follows_rooms"},
            id="worker-follows",
        ),
    ],
)
def test_diagnostics_are_those_of_the_release_and_its_flags(role: Role, engine: EngineFacts, codes: set[str]) -> None:
    """Each has an effect and a remedy; the worst come first."""
    found = diagnostics(engine, role)

    assert {diagnostic.code for diagnostic in found} == codes
    assert all(diagnostic.effect and diagnostic.remedy for diagnostic in found)
    assert [diagnostic.unusable for diagnostic in found] == sorted(
        (diagnostic.unusable for diagnostic in found), reverse=True
    )
