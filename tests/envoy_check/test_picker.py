"""A gateway that speaks the endpoint-picker protocol: its filter for the service, and its routes."""

from collections.abc import Callable
from typing import Any

import pytest

from dp_extproc.config import Config
from dp_extproc.envoy_check.findings import CODES
from envoy_check.samples import EXAMPLES, POOL, Tree, cluster, codes, dump_of, found_in, load, manager

WORKERS = {"models": ["*"], "workers": {"endpoints": ["http://127.0.0.1:1"]}}
OUR_FILTER = "envoy.filters.http.ext_proc"


def picker_config() -> Config:
    return Config.model_validate({"protocol": "endpoint_picker", "pools": [WORKERS]})


def gateway() -> Tree:
    """Return the example of such a gateway, with what its own team has to add."""
    found = load(EXAMPLES / "endpoint-picker.yaml")
    manager(found).update(
        {"request_headers_timeout": "10s", "request_timeout": "60s", "delayed_close_timeout": "0.050s"}
    )
    return found


def processor(bootstrap: Tree) -> Tree:
    found: Tree = next(each for each in manager(bootstrap)["http_filters"] if each["name"] == OUR_FILTER)
    return dict(found["typed_config"], filter=found)


def mode(**fields: str) -> Callable[[Tree], object]:
    return lambda bootstrap: processor(bootstrap)["processing_mode"].update(fields)


def top(**fields: Any) -> Callable[[Tree], object]:
    return lambda bootstrap: processor(bootstrap)["filter"]["typed_config"].update(fields)


def buffered(bootstrap: Tree) -> None:
    mode(request_body_mode="BUFFERED", request_trailer_mode="SKIP")(bootstrap)
    processor(bootstrap)["filter"]["typed_config"].pop("message_timeout")
    bootstrap["static_resources"]["listeners"][0]["per_connection_buffer_limit_bytes"] = 64 << 20


def without_filter(bootstrap: Tree) -> None:
    manager(bootstrap)["http_filters"].remove(processor(bootstrap)["filter"])


CHANGES: dict[str, tuple[Callable[[Tree], object], str]] = {
    "no filter": (without_filter, "picker_missing"),
    "no requests": (mode(request_header_mode="SKIP"), "picker_request_headers"),
    "no bodies": (mode(request_body_mode="NONE"), "picker_request_body"),
    "partial bodies": (mode(request_body_mode="BUFFERED_PARTIAL"), "picker_request_body"),
    "no responses": (mode(response_header_mode="SKIP"), "picker_response_headers"),
    "events": (mode(response_body_mode="FULL_DUPLEX_STREAMED"), "picker_response_bodies"),
    "whole responses": (mode(response_body_mode="BUFFERED"), "answers_buffered"),
    "fail open": (top(failure_mode_allow=True), "picker_fails_open"),
    "message timeout": (buffered, "picker_message_timeout"),
    "route timeout": (
        lambda bootstrap: manager(bootstrap)["route_config"]["virtual_hosts"][0]["routes"][0]["route"].pop("timeout"),
        "route_timeout",
    ),
    "idle timeout": (lambda bootstrap: manager(bootstrap).pop("stream_idle_timeout"), "stream_idle_timeout"),
    "breakers of the service": (
        lambda bootstrap: cluster(bootstrap, "endpoint_picker").pop("circuit_breakers"), "circuit_breakers"
    ),
    "breakers of the engines": (
        lambda bootstrap: cluster(bootstrap, "workers").pop("circuit_breakers"), "circuit_breakers"
    ),
}  # fmt: skip


def test_example_has_no_findings() -> None:
    """As a file and as a dump."""
    assert found_in(picker_config(), gateway()) == []
    assert found_in(picker_config(), dump_of(gateway())) == []


@pytest.mark.parametrize("change", CHANGES)
def test_change_has_its_finding_and_no_other(change: str) -> None:
    """The finding names the route and the filter, or the cluster."""
    apply, code = CHANGES[change]
    bootstrap = gateway()
    apply(bootstrap)

    found = found_in(picker_config(), bootstrap)

    assert codes(found) == [code]
    assert found[0].place.startswith(("listener inference", "cluster ", "routes"))


def test_settings_of_the_route_are_those_that_count() -> None:
    """Some gateways have one filter for all pickers, which calls nothing, and the route has the settings."""
    bootstrap = gateway()
    shared = processor(bootstrap)["filter"]["typed_config"]
    here: Tree = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute",
        "overrides": {"grpc_service": shared["grpc_service"], "processing_mode": shared["processing_mode"]},
    }
    manager(bootstrap)["route_config"]["virtual_hosts"][0]["routes"][0]["typed_per_filter_config"] = {OUR_FILTER: here}
    shared["grpc_service"] = {"envoy_grpc": {"cluster_name": "dummy"}}
    shared["processing_mode"] = {"request_header_mode": "SKIP", "response_header_mode": "SKIP"}
    assert found_in(picker_config(), bootstrap) == []

    here["overrides"]["processing_mode"] = {**here["overrides"]["processing_mode"], "response_header_mode": "SKIP"}
    assert codes(found_in(picker_config(), bootstrap)) == ["picker_response_headers"]


def test_filters_of_others_are_left_alone() -> None:
    """The filter that calls the port of the service is meant, also if its endpoints come from a control plane."""
    bootstrap = gateway()
    other = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "guard"}},
        "processing_mode": {"request_header_mode": "SKIP"},
        "failure_mode_allow": True,
    }
    manager(bootstrap)["http_filters"].insert(0, {"name": "guard", "typed_config": other})
    service = cluster(bootstrap, "endpoint_picker")
    endpoints = service.pop("load_assignment")
    service.update({"type": "EDS", "eds_cluster_config": {"service_name": "picker"}})
    dump = dump_of(bootstrap)
    dump["configs"].append(
        {
            "@type": "type.googleapis.com/envoy.admin.v3.EndpointsConfigDump",
            "dynamic_endpoint_configs": [{"endpoint_config": {**endpoints, "cluster_name": "picker"}}],
        }
    )

    assert found_in(picker_config(), dump) == []


@pytest.mark.parametrize(
    ("timeout", "response_body", "expected"),
    [
        ("0.1s", "NONE", ["picker_hold"]),
        ("20s", "NONE", []),
        ("0.1s", "FULL_DUPLEX_STREAMED", ["picker_response_bodies"]),
    ],
)  # fmt: skip
def test_headers_are_held_for_less_than_the_gateway_waits(
    timeout: str, response_body: str, expected: list[str]
) -> None:
    """The service holds them for picker.hold in pools with prefill and decode, except in full duplex."""
    config = Config.model_validate({"protocol": "endpoint_picker", "pools": [POOL]})
    bootstrap = gateway()
    top(message_timeout=timeout)(bootstrap)
    mode(response_body_mode=response_body)(bootstrap)

    assert codes(found_in(config, bootstrap)) == expected


def test_every_code_has_a_test() -> None:
    """A rule that never finds anything would not be missed."""
    assert {code for code in CODES if code.startswith("picker_")} <= {
        "picker_hold",
        *(code for _, code in CHANGES.values()),
    }
