"""Routing fields stand in headers where these can hold all of them, and else in the body."""

import json
from dataclasses import replace
from typing import Any

import pytest

from dp_extproc import contract
from dp_extproc.engines.model import Role
from dp_extproc.request.path import Api
from dp_extproc.request.rewrite import ROUTING_KEYS
from dp_extproc.scheduling.decision import Decision
from fleet_fixtures import Fleet, make_facts

GENERATE = {"text": "a b c"}
PREFILL, DECODE = (replace(make_facts(role), reads_overrides=True) for role in (Role.PREFILL, Role.DECODE))
LISTENER = (3, 4)


def place(body: dict[str, Any], *, listeners: bool = False, policy: dict[str, Any] | None = None) -> Decision:
    facts = [replace(each, dp_ranks=1, single_rank=LISTENER) if listeners else each for each in (PREFILL, DECODE)]
    fleet = Fleet(prefills=facts[:1], decodes=facts[1:], policy=policy, routing_fields="headers")
    decision = fleet.scheduler.place(Api.GENERATE, json.dumps(body).encode())
    assert isinstance(decision, Decision), decision
    return decision


def overrides(decision: Decision) -> set[str]:
    return {name.removeprefix(contract.OVERRIDE_PREFIX) for name, _ in decision.headers if "override" in name}


SETTINGS = {
    "ranks": {},
    "ranks left to the engine": {"policy": {"dp_rank": "none"}},
    "a listener for each rank": {"listeners": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_body_without_routing_fields_is_unchanged(settings: dict[str, Any]) -> None:
    """Headers have all routing fields."""
    decision = place(GENERATE, **settings)

    assert decision.body is None
    assert overrides(decision) >= {"bootstrap-host", "bootstrap-port", "bootstrap-room", "rid"}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("value", [1, None, "x"], ids=["set", "null", "of a wrong type"])
@pytest.mark.parametrize("key", sorted(ROUTING_KEYS))
def test_routing_field_of_a_client_reaches_no_engine(key: str, value: object, settings: dict[str, Any]) -> None:
    """If the body of a client has one, the routing fields stand in the body, and the one of the client is gone."""
    decision = place({**GENERATE, key: value}, **settings)
    assert decision.body is not None
    headers = dict(decision.headers)
    rest = decision.body[int(headers[contract.PREFIX_LENGTH]) :]
    legs = [json.loads(decision.body), json.loads(headers[contract.PREFILL_PREFIX] + rest)]

    assert overrides(decision) == set()
    for leg in legs:
        assert leg["bootstrap_room"] > 1
        assert leg["bootstrap_host"] == "10.0.0.1"
        assert "data_parallel_rank" not in leg
        if settings:
            assert "routed_dp_rank" not in leg


@pytest.mark.parametrize("routing_fields", ["body", "headers"])
@pytest.mark.parametrize(
    ("url_host", "configured", "sent"),
    [
        ("::1", None, "[::1]"),
        ("10.0.0.1", "fd00::1", "[fd00::1]"),
        ("10.0.0.1", "[fd00::1]", "[fd00::1]"),
        ("fd00::1", "prefill-0.example", "prefill-0.example"),
        ("10.0.0.1", None, "10.0.0.1"),
    ],
)
def test_bootstrap_host_of_ipv6_is_in_brackets(
    url_host: str, configured: str | None, sent: str, routing_fields: str
) -> None:
    """Releases up to 0.5.9 make a URL of it as it is; later ones remove the brackets."""
    fleet = Fleet(prefills=[PREFILL], decodes=[DECODE], routing_fields=routing_fields)
    host = fleet.endpoint(Role.PREFILL)
    host.configured = replace(host.configured, host=url_host, bootstrap_host=configured)
    decision = fleet.scheduler.place(Api.GENERATE, json.dumps(GENERATE).encode())

    assert isinstance(decision, Decision)
    if routing_fields == "headers":
        told = dict(decision.headers)[contract.OVERRIDE_PREFIX + "bootstrap-host"].decode()
    else:
        assert decision.body is not None
        told = json.loads(decision.body)["bootstrap_host"]
    assert told == sent
