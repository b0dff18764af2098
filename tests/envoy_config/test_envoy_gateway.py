"""Envoy Gateway's form, with what Envoy Gateway made of it (``make envoy-gateway-run``), without Go.

Envoy Gateway delivers clusters and listeners as they are printed, which the run compares. So the recording has only
their names, and a test puts the present print into their places.
"""

from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from dp_extproc.config import BodyMode, Config
from dp_extproc.envoy_check import Severity
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats.target import ObjectName, Target
from envoy_config.harness import make_config
from envoy_config.recorded_gateway import (
    HOST,
    Resources,
    address_of,
    bootstrap_of,
    check,
    check_hosts,
    recorded,
    run_recorded,
    static_cluster,
)

RECORDING: Final = "envoy-gateway"
TARGET: Final = Target(ObjectName("default", "shared"), (HOST,), 8080, ("http",))
"""What the command line gave for the recording."""
_LISTENER: Final = "default/shared/http"
_NEIGHBOUR: Final = "httproute/default/other/rule/0"


def printed(config: Config, target: Target = TARGET) -> list[dict[str, Any]]:
    texts = FORMS["envoy-gateway"].files(config, target)
    return list(yaml.safe_load_all(texts["dp-extproc.yaml"]))


def patches_of(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (patches,) = (each["spec"]["jsonPatches"] for each in resources if each["kind"] == "EnvoyPatchPolicy")
    return list(patches)


def whole(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the clusters and listeners among the patches."""
    operations = [each["operation"] for each in patches_of(resources)]
    return [each["value"] for each in operations if not each["path"]]


def test_printed_resources_are_the_recorded_ones() -> None:
    """Envoy Gateway has to find the same places for the same names. A difference needs a new recording."""
    resources = printed(make_config(BodyMode.BUFFERED, [1, 2, 3]))
    for value in whole(resources):
        for key in value.keys() - {"name"}:
            del value[key]
    assert resources == recorded(RECORDING)["printed"]


def resources_of(config: Config, neighbour: str) -> Resources:
    """Build static resources from what was delivered, with the present print in the places of the recorded one."""
    delivered, ours = recorded(RECORDING)["delivered"], whole(printed(config))
    (routes,) = delivered["dynamic_route_configs"]
    (listener,) = (each for each in delivered["dynamic_listeners"] if each["name"] == _LISTENER)
    listener["address"]["socket_address"] = address_of(str(config.envoy.inference))
    manager = listener["default_filter_chain"]["filters"][0]["typed_config"]
    del manager["rds"]
    manager["route_config"] = routes
    (theirs,) = (each for each in delivered["dynamic_active_clusters"] if each["name"] == _NEIGHBOUR)
    return {
        "listeners": [listener, *(each for each in ours if "internal_listener" in each)],
        "clusters": [static_cluster(theirs, neighbour), *(each for each in ours if "internal_listener" not in each)],
    }


def test_recorded_gateway_leads_our_host_into_the_block_alone() -> None:
    """Both legs arrive, forged headers have no effect, and the other host of the gateway gets its headers untouched."""
    with run_recorded(resources_of, {}) as gateway:
        check_hosts(gateway)


def test_check_accepts_the_recorded_gateway(tmp_path: Path) -> None:
    """The filter that removes headers before the router is left out on purpose, which is a warning."""
    config = make_config(BodyMode.BUFFERED, [1, 2, 3])
    findings = check(bootstrap_of(config, resources_of(config, "127.0.0.1:4"), {}), config, tmp_path)

    assert {each.severity for each in findings} == {Severity.WARNING}
    assert {each.code for each in findings} == {"client_headers_kept", "delayed_close"}


def test_listeners_and_host_names_are_those_of_the_command_line() -> None:
    """Each listener gets the patches of its own route table, and two instances have names of their own."""
    config = make_config(BodyMode.BUFFERED, [1, 2, 3])
    envoy = config.envoy.model_copy(update={"name_prefix": "LLM_"})
    target = Target(ObjectName("edge", "public"), ("a.example.com", "*.b.example.com"), None, ("http", "https"))
    resources = printed(config.model_copy(update={"envoy": envoy}), target)

    assert {(each["metadata"]["namespace"], each["metadata"]["name"]) for each in resources} == {
        ("edge", "llm-dp-extproc")
    }
    (route,) = (each["spec"] for each in resources if each["kind"] == "HTTPRoute")
    assert route["hostnames"] == ["a.example.com", "*.b.example.com"]
    assert [(each["name"], each["sectionName"]) for each in route["parentRefs"]] == [
        ("public", "http"),
        ("public", "https"),
    ]
    tables = [each["name"] for each in patches_of(resources) if "jsonPath" in each["operation"]]
    assert tables == ["edge/public/http"] * 2 + ["edge/public/https"] * 2
    generated = "httproute/edge/llm-dp-extproc/rule/0"
    assert all(generated in each["operation"].get("jsonPath", generated) for each in patches_of(resources))
    assert {each["name"] for each in whole(resources) if not each["name"].startswith("LLM_")} == {generated}


@pytest.mark.parametrize("attempts", [1, 2])
def test_routes_have_retries_if_the_configuration_has_some(attempts: int) -> None:
    config = make_config(BodyMode.BUFFERED, [1, 2, 3])
    retry = config.retry.model_copy(update={"attempts": attempts})
    patches = patches_of(printed(config.model_copy(update={"retry": retry})))

    paths = [each["operation"]["path"] for each in patches if "jsonPath" in each["operation"]]
    assert paths == ["/route/retry_policy"] * (attempts - 1) + ["/request_body_buffer_limit"]


def test_example_of_the_gateway_has_the_extension_once() -> None:
    texts = FORMS["envoy-gateway"].files(make_config(BodyMode.BUFFERED, [1, 2, 3]), TARGET)
    (proxy,) = (each for each in yaml.safe_load_all(texts["gateway.yaml"]) if each["kind"] == "EnvoyProxy")
    (patch,) = proxy["spec"]["bootstrap"]["jsonPatches"]

    assert (patch["op"], patch["path"]) == ("add", "/bootstrap_extensions")  # replaces what is there
    assert [each["name"] for each in patch["value"]] == ["envoy.bootstrap.internal_listener"]
