"""``envoy.body_mode: none``: settings that need bodies are refused, each with its place and remedy."""

import pytest

from dp_extproc.config import BodyMode, ConfigError, parse_config

POLICY = "policy: {affinity: {prefixes: false}}"
PAIR = "prefill: {endpoints: ['http://a:1']}, decode: {endpoints: ['http://b:1']}"
FITTING = f"{{models: [m], routing_fields: headers, {PAIR}, {POLICY}}}"


def problems(*pools: str) -> list[tuple[int | None, str, str]]:
    text = "envoy: {body_mode: none}\npools:\n" + "".join(f"- {pool}\n" for pool in pools)
    try:
        parse_config(text)
    except ConfigError as error:
        return [(problem.line, problem.key, problem.message) for problem in error.problems]
    return []


def test_pool_is_accepted_if_headers_suffice() -> None:
    """A disaggregated pool with routing fields in headers needs no bodies, whatever its other settings."""
    assert problems(FITTING) == []
    config = parse_config(f"envoy: {{body_mode: none}}\nqueue: {{}}\npools: [{FITTING}]")
    assert config.envoy.body_mode is BodyMode.NONE


@pytest.mark.parametrize(
    ("pool", "key", "remedy"),
    [
        (FITTING.replace("routing_fields: headers, ", ""), "routing_fields", "routing_fields: headers"),
        (FITTING.replace(f", {POLICY}", ""), "policy.affinity.prefixes", "{prefixes: false}"),
        (FITTING.replace("}}}", "}, client_dp_rank: honour}}"), "policy.client_dp_rank", "client_dp_rank: replace"),
        (FITTING.replace("}}}", "}, dp_rank: none}}"), "policy.dp_rank", "another policy"),
        (
            FITTING.replace("'http://b:1'", "{url: 'http://b:1', dp_rank: 1}"),
            "decode.endpoints[0].dp_rank",
            "takes no rank by headers",
        ),
    ],
)
def test_setting_is_refused_if_it_needs_bodies(pool: str, key: str, remedy: str) -> None:
    """Each problem has its line and remedy."""
    ((line, place, message),) = problems(pool)

    assert (line, place) == (3, f"pools[0].{key}")
    assert message.startswith("envoy.body_mode: none: ")
    assert remedy in message


def test_aggregated_pool_is_refused_without_bodies() -> None:
    """Its rank is a field of the body, and prompts cannot be compared either."""
    found = problems("{models: [m], workers: {endpoints: ['http://a:1']}}")

    assert [key for _, key, _ in found] == ["pools[0].workers", "pools[0].policy.affinity.prefixes"]


def test_second_pool_is_refused_without_bodies() -> None:
    """The model that selects a pool is a field of the body."""
    ((line, key, message),) = problems(
        FITTING, FITTING.replace("a:1", "c:1").replace("b:1", "d:1").replace("[m]", "[n]")
    )

    assert (line, key) == (4, "pools[1]")
    assert "one pool only" in message


def test_other_body_modes_accept_every_pool() -> None:
    """With bodies these settings are free."""
    parse_config(
        f"pools: [{{models: [m], {PAIR}}}, {FITTING.replace('a:1', 'c:1').replace('b:1', 'd:1').replace('[m]', '[n]')}]"
    )
