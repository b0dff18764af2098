"""Weights of revision groups in the configuration file."""

import pytest

from dp_extproc.config import ConfigError, parse_config

POOL = "pools:\n- models: ['*']\n  workers: {endpoints: ['http://a:1', {url: 'http://b:1', group: v2}]}\n"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("{v2: 5%}", {"v2": 0.05}),
        ("{v2: 0.05}", {"v2": 0.05}),
        ("{v2: 12.5 %, v1: 0%}", {"v2": 0.125, "v1": 0.0}),
        ("{a: 70%, b: 20%, c: 10%}", {"a": 0.7, "b": 0.2, "c": 0.1}),
        ("{v2: 100%, v1: 0}", {"v2": 1.0, "v1": 0.0}),
        ("{}", {}),
    ],
)
def test_weights_are_shares_of_the_requests(weights: str, expected: dict[str, float]) -> None:
    """They may add up to less than all: the other groups share the rest."""
    (pool,) = parse_config(f"{POOL}  groups: {{weights: {weights}}}\n").pools

    assert dict(pool.groups.weights) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("weights", "key", "message"),
    [
        ("{v2: 5}", "pools[0].groups.weights.v2", "write a share of the requests from 0% to 100%, such as 5% or 0.05"),
        ("{v2: 1}", "pools[0].groups.weights.v2", "write a share of the requests from 0% to 100%, such as 5% or 0.05"),
        ("{v2: 1.0}", "pools[0].groups.weights.v2", "write a share of the requests from 0% to 100%"),
        ("{v2: 110%}", "pools[0].groups.weights.v2", "write a share of the requests from 0% to 100%"),
        ("{v2: -5%}", "pools[0].groups.weights.v2", "write a share of the requests from 0% to 100%"),
        ("{v2: .nan}", "pools[0].groups.weights.v2", "write a share of the requests from 0% to 100%"),
        ("{v2: true}", "pools[0].groups.weights.v2", "write a share of the requests from 0% to 100%"),
        ("{v1: 60%, v2: 50%}", "pools[0].groups", "the weights add up to 110%; lower them to 100% or less"),
        ("{2: 5%}", "pools[0].groups.weights.2", "is not a word to YAML; put it in quotes"),
        ("{a b: 5%}", "pools[0].groups.weights.a b", "not 'a b'"),
        ("5%", "pools[0].groups.weights", "not '5%'"),
    ],
)
def test_wrong_weights_are_refused_with_a_remedy(weights: str, key: str, message: str) -> None:
    """A whole number could be a percentage or a share."""
    with pytest.raises(ConfigError) as failed:
        parse_config(f"{POOL}  groups: {{weights: {weights}}}\n")
    (problem,) = failed.value.problems

    assert (problem.line, problem.key) == (4, key)
    assert message in problem.message


def test_static_endpoint_has_its_group() -> None:
    """An endpoint without one belongs to none."""
    (pool,) = parse_config(POOL).pools

    assert [endpoint.group for _, _, endpoint in pool.endpoints()] == [None, "v2"]
