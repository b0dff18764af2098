"""Who sends the prefill leg: the default follows the protocol, and what cannot work is refused with a remedy."""

from typing import Any

import pytest
import yaml

from dp_extproc.config import ConfigError, PickerSettings, parse_config

DISAGGREGATED = {"models": ["*"], "prefill": {"endpoints": ["http://10.0.0.1:1"]},
                 "decode": {"endpoints": ["http://10.0.0.2:1"]}}  # fmt: skip
AGGREGATED = {"models": ["*"], "workers": {"endpoints": ["http://10.0.0.1:1"]}}
PICKER = {"protocol": "endpoint_picker"}
SERVICE = {"prefill_leg": "service"}


def write(pool: dict[str, Any], sections: dict[str, Any]) -> str:
    return yaml.safe_dump({**sections, "pools": [pool]})


@pytest.mark.parametrize(
    ("sections", "sends"),
    [({}, False), (PICKER, True), (SERVICE, True), ({"prefill_leg": "envoy"}, False), ({**PICKER, **SERVICE}, True)],
)
def test_sender_of_the_prefill_leg_follows_the_protocol(sections: dict[str, Any], sends: bool) -> None:
    """A gateway that asks a picker sends a request to one endpoint."""
    assert parse_config(write(DISAGGREGATED, sections)).sends_legs is sends


@pytest.mark.parametrize(
    ("pool", "sections", "key", "remedy"),
    [
        (DISAGGREGATED, {**PICKER, "prefill_leg": "envoy"}, "prefill_leg", "leave prefill_leg out"),
        (AGGREGATED, {**PICKER, "retry": {"attempts": 2}}, "retry.attempts", "leave attempts out"),
        (DISAGGREGATED, {**SERVICE, "envoy": {"body_mode": "none"}}, "envoy.body_mode", "write buffered"),
        ({**DISAGGREGATED, "routing_fields": "headers"}, SERVICE, "pools[0].routing_fields", "write body"),
    ],
)
def test_impossible_prefill_leg_is_refused(
    pool: dict[str, Any], sections: dict[str, Any], key: str, remedy: str
) -> None:
    """The message is at the key to change."""
    with pytest.raises(ConfigError) as failed:
        parse_config(write(pool, sections))

    (problem,) = failed.value.problems
    assert problem.key == key
    assert remedy in problem.message


@pytest.mark.parametrize(
    ("pool", "sections"),
    [
        (AGGREGATED, {**PICKER, "prefill_leg": "envoy"}),
        (AGGREGATED, {**PICKER, "retry": {"attempts": 1, "budget": 0.5}}),
        ({**DISAGGREGATED, "routing_fields": "headers"}, {"prefill_leg": "envoy"}),
    ],
)
def test_possible_prefill_leg_is_accepted(pool: dict[str, Any], sections: dict[str, Any]) -> None:
    """What no pool needs is no mistake."""
    parse_config(write(pool, sections))


def test_headers_can_be_held_for_no_time() -> None:
    """For gateways whose timer is too short for anything else."""
    sections = {**PICKER, "picker": {"hold": "0s", "fallbacks": 3}}

    assert parse_config(write(DISAGGREGATED, sections)).picker == PickerSettings.model_validate(
        {"hold": "0s", "fallbacks": 3}
    )
