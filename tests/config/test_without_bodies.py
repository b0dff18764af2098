"""``envoy.body_mode: none``: what only bodies can do is refused, each at its place and with what to write."""

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


def test_a_pool_that_headers_can_serve() -> None:
    """Prefill and decode, told by headers, placed by load, whatever its other settings."""
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
def test_what_needs_bodies(pool: str, key: str, remedy: str) -> None:
    """Each is told with its line and the way out."""
    ((line, place, message),) = problems(pool)

    assert (line, place) == (3, f"pools[0].{key}")
    assert message.startswith("envoy.body_mode: none: ")
    assert remedy in message


def test_servers_that_do_both() -> None:
    """Their rank stands in bodies, so both objections stand: to them, and to comparing prompts."""
    found = problems("{models: [m], workers: {endpoints: ['http://a:1']}}")

    assert [key for _, key, _ in found] == ["pools[0].workers", "pools[0].policy.affinity.prefixes"]


def test_several_pools() -> None:
    """The model that tells pools apart stands in bodies."""
    ((line, key, message),) = problems(
        FITTING, FITTING.replace("a:1", "c:1").replace("b:1", "d:1").replace("[m]", "[n]")
    )

    assert (line, key) == (4, "pools[1]")
    assert "one pool only" in message


def test_the_same_pool_with_bodies() -> None:
    """Nothing of this is asked for in the other modes."""
    parse_config(
        f"pools: [{{models: [m], {PAIR}}}, {FITTING.replace('a:1', 'c:1').replace('b:1', 'd:1').replace('[m]', '[n]')}]"
    )
