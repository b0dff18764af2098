"""Each change of a printed configuration has exactly the finding that describes it."""

import re
from copy import deepcopy
from typing import Any

import pytest

from dp_extproc.envoy_check import Severity
from dp_extproc.envoy_check.findings import CODES
from envoy_check.samples import (
    ADMIN,
    EXAMPLES,
    Change,
    Tree,
    bootstrap_of,
    cluster,
    codes,
    config_with,
    dump_of,
    example_config,
    found_in,
    http_filter,
    listener,
    manager,
    route,
    section,
)

MANAGER = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
FILTERS = "type.googleapis.com/envoy.extensions.filters.http"
ENDS = "filter_chains[0].filters[envoy.filters.network.http_connection_manager].typed_config"
EXT_PROC = f"{ENDS}.http_filters[envoy.filters.http.ext_proc].typed_config"


def without(key: str) -> Change:
    return lambda part: part.pop(key)


def setting(key: str, value: Any) -> Change:
    return lambda part: part.update({key: value})


def on(find: Any, *names: str, change: Change) -> Change:
    return lambda bootstrap: change(find(bootstrap, *names))


def before_router(name: str, **settings: Any) -> Change:
    """Put a filter into the connection manager of the front door."""
    return lambda bootstrap: manager(bootstrap)["http_filters"].insert(0, {"name": name, "typed_config": settings})


def retry(**fields: Any) -> Change:
    return lambda bootstrap: route(bootstrap)["route"]["retry_policy"].update(fields)


def of_filter(find: Any, owner: str, name: str, change: Change) -> Change:
    return lambda bootstrap: change(http_filter(find(bootstrap, owner), name))


def second_route(target: str) -> Change:
    """Add a route of the front door that leads elsewhere."""
    added = {"match": {"prefix": "/other"}, "route": {"cluster": target, "timeout": "0s"}}
    return lambda bootstrap: manager(bootstrap)["route_config"]["virtual_hosts"][0]["routes"].insert(0, added)


def swapped(bootstrap: Tree) -> None:
    filters = manager(bootstrap, "dp_dispatch")["http_filters"]
    filters[0], filters[1] = filters[1], filters[0]


def default_idle_timeout(bootstrap: Tree) -> None:
    del manager(bootstrap)["stream_idle_timeout"]
    del route(bootstrap)["route"]["idle_timeout"]


def long_streams_cut(bootstrap: Tree) -> None:
    manager(bootstrap)["common_http_protocol_options"] = {"max_stream_duration": "60s"}
    del route(bootstrap)["route"]["max_stream_duration"]


def address_elsewhere(bootstrap: Tree) -> None:
    service = cluster(bootstrap, "extproc")["load_assignment"]["endpoints"][0]["lb_endpoints"][0]
    service["endpoint"]["address"]["socket_address"]["port_value"] = 9999


def forwards_bytes(bootstrap: Tree) -> None:
    proxy = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "raw",
        "cluster": "decode",
    }
    raw = {"name": "raw", "filter_chains": [{"filters": [{"name": "tcp", "typed_config": proxy}]}]}
    bootstrap["static_resources"]["listeners"].append(raw)


DISPATCH, LEG = "listener dp_dispatch", "listener prefill_leg"
WAY = "listener inference, virtual host all, route all"
BREAKERS = {"thresholds": [{"max_connections": 1024, "max_requests": 1024, "max_pending_requests": 1024}]}
CHANGES: dict[str, tuple[Change, str, str]] = {
    # The block.
    "no extension": (without("bootstrap_extensions"), "extension_missing", "bootstrap_extensions"),
    "extension twice": (
        lambda bootstrap: bootstrap["bootstrap_extensions"].append(bootstrap["bootstrap_extensions"][0]),
        "extension_twice",
        "bootstrap_extensions",
    ),
    "no cluster": (
        lambda bootstrap: bootstrap["static_resources"]["clusters"].remove(cluster(bootstrap, "prefill")),
        "cluster_missing",
        "cluster prefill",
    ),
    "no listener": (
        lambda bootstrap: bootstrap["static_resources"]["listeners"].remove(listener(bootstrap, "prefill_leg")),
        "listener_missing",
        LEG,
    ),
    "a cluster twice": (
        lambda bootstrap: bootstrap["static_resources"]["clusters"].append(deepcopy(cluster(bootstrap, "decode"))),
        "name_twice",
        "cluster decode",
    ),
    "a name that is taken": (
        lambda bootstrap: cluster(bootstrap, "decode").update({"type": "STRICT_DNS"}),
        "name_taken",
        "cluster decode",
    ),
    "a listener with an address": (
        on(listener, "decode", change=without("internal_listener")), "name_taken", "listener decode"
    ),
    "ext_proc mode": (
        of_filter(
            manager, "dp_dispatch", "envoy.filters.http.ext_proc",
            lambda part: part["processing_mode"].update({"response_header_mode": "SKIP"}),
        ),
        "field_differs",
        f"{DISPATCH}: {EXT_PROC}.processing_mode.response_header_mode",
    ),
    "failure mode": (
        of_filter(manager, "dp_dispatch", "envoy.filters.http.ext_proc", without("failure_mode_allow")),
        "field_differs",
        f"{DISPATCH}: {EXT_PROC}.failure_mode_allow",
    ),
    "message timeout": (
        of_filter(manager, "dp_dispatch", "envoy.filters.http.ext_proc", without("message_timeout")),
        "field_differs",
        f"{DISPATCH}: {EXT_PROC}.message_timeout",
    ),
    "idle timeout inside": (
        on(manager, "prefill_leg", change=setting("stream_idle_timeout", "300s")),
        "field_differs",
        f"{LEG}: {ENDS}.stream_idle_timeout",
    ),
    "a filter inside": (
        lambda bootstrap: manager(bootstrap, "prefill_leg")["http_filters"].pop(0),
        "field_differs",
        f"{LEG}: {ENDS}.http_filters[envoy.filters.http.header_to_metadata]",
    ),
    "filter order": (swapped, "filter_order", f"{DISPATCH}: {ENDS}.http_filters[order]"),
    "access log": (
        on(manager, "dp_dispatch", change=without("access_log")), "setting_differs", f"{DISPATCH}: {ENDS}.access_log"
    ),
    "window": (
        lambda bootstrap: http2_options(cluster(bootstrap, "extproc_owner")).pop("initial_stream_window_size"),
        "field_differs",
        "initial_stream_window_size",
    ),
    "address of the service": (address_elsewhere, "field_differs", "cluster extproc: load_assignment"),
    "circuit breakers": (
        on(cluster, "decode_server", change=without("circuit_breakers")), "circuit_breakers", "cluster decode_server"
    ),
    "default circuit breakers": (
        on(cluster, "prefill", change=setting("circuit_breakers", BREAKERS)), "circuit_breakers", "cluster prefill"
    ),
    "low circuit breakers": (
        lambda bootstrap: cluster(bootstrap, "decode")["circuit_breakers"]["thresholds"][0].update(
            {"max_requests": 2000}
        ),
        "circuit_breakers_low",
        "cluster decode",
    ),
    "outlier detection": (
        on(cluster, "prefill", change=setting("outlier_detection", {"consecutive_5xx": 5})),
        "outlier_detection",
        "cluster prefill",
    ),
    "a field that a controller adds": (
        on(cluster, "decode_server", change=setting("dns_lookup_family", "V4_ONLY")),
        "setting_differs",
        "cluster decode_server: dns_lookup_family",
    ),
    "a route past scheduling": (
        second_route("decode"), "cluster_exposed", "listener inference, virtual host all, route number 0"
    ),
    "bytes past scheduling": (forwards_bytes, "cluster_exposed", "listener raw"),
    # The way into the block.
    "no route": (
        lambda bootstrap: route(bootstrap)["route"].update({"cluster": "elsewhere"}), "no_entrance", "routes"
    ),
    "no retry policy": (
        lambda bootstrap: route(bootstrap)["route"].pop("retry_policy"), "retry_policy_missing", WAY
    ),
    "another retry policy": (retry(retry_on="connect-failure"), "retry_policy_ineffective", WAY),
    "retries by another header": (retry(retriable_headers=[{"name": "x-other"}]), "retry_policy_ineffective", WAY),
    "retries by status": (retry(retry_on="5xx,reset"), "retry_by_status", WAY),
    "no retries of resets": (retry(retry_on="retriable-headers"), "retry_without_reset", WAY),
    "too few retries": (retry(num_retries=1), "too_few_retries", WAY),
    "timeout of each try": (retry(per_try_timeout="5s"), "per_try_timeout", WAY),
    "response headers": (on(route, change=without("response_headers_to_remove")), "response_headers_kept", WAY),
    "default timeout": (lambda bootstrap: route(bootstrap)["route"].pop("timeout"), "route_timeout", WAY),
    "timeout": (lambda bootstrap: route(bootstrap)["route"].update({"timeout": "60s"}), "route_timeout", WAY),
    "default idle timeout": (default_idle_timeout, "stream_idle_timeout", WAY),
    "idle timeout of the route": (
        lambda bootstrap: route(bootstrap)["route"].update({"idle_timeout": "60s"}), "stream_idle_timeout", WAY
    ),
    "stream duration": (long_streams_cut, "stream_duration", WAY),
    "headers of clients": (
        on(manager, change=without("early_header_mutation_extensions")), "client_headers_kept", WAY
    ),
    "headers timeout": (on(manager, change=without("request_headers_timeout")), "no_request_timeouts", WAY),
    "delayed close": (on(manager, change=without("delayed_close_timeout")), "delayed_close", WAY),
    "buffer": (
        on(listener, "inference", change=setting("per_connection_buffer_limit_bytes", 32768)), "buffer_limit", WAY
    ),
    "buffer of the route": (on(route, change=setting("request_body_buffer_limit", "65536")), "buffer_limit", WAY),
    "buffer of one request": (on(route, change=setting("per_request_buffer_limit_bytes", 65536)), "buffer_limit", WAY),
    "buffer filter": (
        before_router("buffer", **{"@type": f"{FILTERS}.buffer.v3.Buffer", "max_request_bytes": 65536}),
        "filter_limits_body",
        WAY,
    ),
    "authorization of bodies": (
        before_router(
            "authz", **{"@type": f"{FILTERS}.ext_authz.v3.ExtAuthz", "with_request_body": {"max_request_bytes": 8192}}
        ),
        "filter_limits_body",
        WAY,
    ),
    "buffered responses": (
        before_router(
            "guard",
            **{
                "@type": f"{FILTERS}.ext_proc.v3.ExternalProcessor",
                "grpc_service": {"envoy_grpc": {"cluster_name": "guard"}},
                "processing_mode": {"response_body_mode": "BUFFERED"},
            },
        ),
        "answers_buffered",
        WAY,
    ),
    "compressed events": (
        before_router(
            "gzip",
            **{
                "@type": f"{FILTERS}.compressor.v3.Compressor",
                "response_direction_config": {"common_config": {"content_type": ["text/event-stream"]}},
            },
        ),
        "compressed_streams",
        WAY,
    ),
}  # fmt: skip


def http2_options(owner: Tree) -> Tree:
    (options,) = owner["typed_extension_protocol_options"].values()
    found: Tree = options["explicit_http_config"]["http2_protocol_options"]
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_change_has_its_finding_and_no_other(change: str) -> None:
    """The finding names the place, what happens and a remedy."""
    apply, code, place = CHANGES[change]
    config = example_config()
    bootstrap = bootstrap_of(config)
    apply(bootstrap)

    found = found_in(config, bootstrap)

    assert codes(found) == [code]
    assert place in found[0].place
    assert found[0].effect
    assert found[0].remedy


def harmless(bootstrap: Tree) -> None:
    """Change what a gateway may have otherwise: filters of its own, and removals in other places."""
    manager(bootstrap)["http_filters"][:0] = [
        {"name": "jwt", "typed_config": {"@type": "type.googleapis.com/some.company.v1.Filter", "a": [{"b": None}]}},
        {"name": "gzip", "typed_config": {"@type": f"{FILTERS}.compressor.v3.Compressor"}},
        {
            "name": "strip",
            "disabled": True,
            "typed_config": {"@type": f"{FILTERS}.header_mutation.v3.HeaderMutation"},
        },
        {
            "name": "small",
            "typed_config": {"@type": f"{FILTERS}.buffer.v3.Buffer", "max_request_bytes": 65536},
        },
    ]
    removals: list[Tree] = [
        {"remove_on_match": {"key_matcher": {"prefix": prefix}}} for prefix in ("x-dp-", "x-override-", "x-e")
    ]
    removals.append({"remove": "X-Data-Parallel-Rank"})
    del manager(bootstrap)["early_header_mutation_extensions"]
    del listener(bootstrap, "inference")["per_connection_buffer_limit_bytes"]
    here = route(bootstrap)
    here["typed_per_filter_config"] = {
        "strip": {
            "@type": f"{FILTERS}.header_mutation.v3.HeaderMutationPerRoute",
            "mutations": {
                "request_mutations": removals,
                "response_mutations": [{"remove": "x-dp-retry"}, {"remove": "x-dp-failed"}],
            },
        },
        "small": {"@type": f"{FILTERS}.buffer.v3.BufferPerRoute", "disabled": True},
    }
    here["request_body_buffer_limit"] = "68157440"
    del here["response_headers_to_remove"]
    host = manager(bootstrap)["route_config"]["virtual_hosts"][0]
    host["retry_policy"] = here["route"].pop("retry_policy")


def test_another_gateway_may_do_the_same_in_other_places() -> None:
    """Retry policy of the virtual host, removals by a filter of the route, a buffer of the route, unknown filters."""
    config = example_config()
    bootstrap = bootstrap_of(config)
    harmless(bootstrap)

    assert found_in(config, bootstrap) == []


def test_disabled_filter_removes_no_headers() -> None:
    """A filter that only other routes enable does nothing for this one."""
    config = example_config()
    bootstrap = bootstrap_of(config)
    harmless(bootstrap)
    removed = route(bootstrap)["typed_per_filter_config"].pop("strip")
    manager(bootstrap)["http_filters"][2]["typed_config"] = {
        "@type": f"{FILTERS}.header_mutation.v3.HeaderMutation",
        "mutations": removed["mutations"],
    }

    assert codes(found_in(config, bootstrap)) == ["response_headers_kept", "client_headers_kept"]


def test_cluster_of_another_name_may_lead_into_the_block() -> None:
    """Controllers choose names. Such a cluster is compared with the printed one that it stands for."""
    config = example_config()
    bootstrap = bootstrap_of(config)
    leading = cluster(bootstrap, "dp_dispatch")
    leading["name"] = leading["load_assignment"]["cluster_name"] = "httproute/llm/rule/0"
    route(bootstrap)["route"]["cluster"] = leading["name"]
    assert found_in(config, bootstrap) == []

    leading["circuit_breakers"] = BREAKERS
    leading["outlier_detection"] = {}
    del leading["typed_extension_protocol_options"]
    found = found_in(config, bootstrap)

    assert codes(found) == ["field_differs", "circuit_breakers", "outlier_detection"]
    assert all(each.place.startswith("cluster httproute/llm/rule/0") for each in found)


def test_block_with_another_prefix_is_named() -> None:
    """The finding lets the reader see that the prefix of the configuration is another one."""
    bootstrap = bootstrap_of(config_with(envoy={"name_prefix": "llm_"}))

    found = found_in(config_with(), bootstrap)

    assert set(codes(found)) == {"listener_missing", "cluster_missing", "no_entrance"}
    assert any("there is llm_prefill_leg, perhaps of another envoy.name_prefix" in each.effect for each in found)


@pytest.mark.parametrize(
    ("version", "expected"),
    [((1, 35, 9), ["version_not_supported"]), ((1, 36, 0), []), ((1, 40, 7), []), ((1, 41, 0), ["version_not_tested"])],
)
def test_version_is_compared_with_the_supported_ones(version: tuple[int, int, int], expected: list[str]) -> None:
    """Patch releases make no difference."""
    config = example_config()

    assert codes(found_in(config, dump_of(bootstrap_of(config), version=version))) == expected


def test_two_duplex_filters_are_found_in_old_versions_only() -> None:
    """Before 1.38 they truncate bodies."""
    config = example_config()
    bootstrap = bootstrap_of(config)
    for name in ("one", "two"):
        before_router(
            name,
            **{
                "@type": f"{FILTERS}.ext_proc.v3.ExternalProcessor",
                "processing_mode": {"request_body_mode": "FULL_DUPLEX_STREAMED"},
            },
        )(bootstrap)

    assert codes(found_in(config, dump_of(bootstrap, version=(1, 37, 0)))) == ["two_duplex_filters"]
    assert found_in(config, dump_of(bootstrap)) == []


def test_build_without_v8_is_found_if_the_block_needs_it() -> None:
    """Some builds leave it out. They refuse the listener of the filter that ends truncated streams."""
    found = {}
    for ending in ("error_event", "reset"):
        config = config_with(envoy={"truncated_streams": ending})
        dump = dump_of(bootstrap_of(config))
        section(dump, "BootstrapConfigDump")["bootstrap"]["node"]["extensions"] = [{"name": "envoy.wasm.runtime.null"}]
        found[ending] = codes(found_in(config, dump))

    assert found == {"error_event": ["wasm_missing"], "reset": []}


def test_rejected_updates_are_reported() -> None:
    """Those of the block are errors, also where no earlier version of the resource is active."""
    config = example_config()
    dump = dump_of(bootstrap_of(config), dynamic=True)
    error = {"failed_configuration": {"@type": "x", "name": "foreign"}, "details": "no\n such filter"}
    section(dump, "ListenersConfigDump")["dynamic_listeners"][1]["error_state"] = error
    section(dump, "ClustersConfigDump")["dynamic_active_clusters"].append({"error_state": error})

    found = found_in(config, dump)

    assert [(each.code, each.place) for each in found] == [
        ("update_rejected", "listener dp_dispatch"),
        ("foreign_update_rejected", "cluster foreign"),
    ]
    assert "no such filter" in found[0].effect


def test_warming_and_draining_resources_do_not_count_as_active() -> None:
    """A warming one is reported, if no earlier one is active. What drains gets no new requests."""
    config = example_config()
    dump = dump_of(bootstrap_of(config), dynamic=True)
    listeners = section(dump, "ListenersConfigDump")["dynamic_listeners"]
    front, dispatch = listeners[0], listeners[1]
    dispatch["warming_state"] = dispatch.pop("active_state")
    front["draining_state"] = deepcopy(front["active_state"])
    front["draining_state"]["listener"]["per_connection_buffer_limit_bytes"] = 1

    assert codes(found_in(config, dump)) == ["not_active"]


def test_routes_and_filters_by_name_are_followed() -> None:
    """RDS, scoped routes and ECDS: another control plane delivers them apart from the listener."""
    config = example_config()
    dump = dump_of(bootstrap_of(config), dynamic=True)
    front = section(dump, "ListenersConfigDump")["dynamic_listeners"][0]["active_state"]["listener"]
    settings = front["filter_chains"][0]["filters"][0]["typed_config"]
    table = {"name": "table", **settings.pop("route_config")}
    del table["virtual_hosts"][0]["routes"][0]["route"]["retry_policy"]
    section(dump, "RoutesConfigDump")["dynamic_route_configs"] = [{"route_config": table}]
    buffer = {"@type": f"{FILTERS}.buffer.v3.Buffer", "max_request_bytes": 1}
    settings["http_filters"].insert(0, {"name": "small", "config_discovery": {"config_source": {"ads": {}}}})
    dump["configs"].append(
        {
            "@type": f"{ADMIN}.EcdsConfigDump",
            "ecds_filters": [{"ecds_filter": {"name": "small", "typed_config": buffer}}],
        }
    )

    settings["rds"] = {"route_config_name": "table"}
    by_name = codes(found_in(config, dump))
    del settings["rds"]
    settings["scoped_routes"] = {"name": "scopes", "scoped_rds": {}}
    dump["configs"].append(
        {
            "@type": f"{ADMIN}.ScopedRoutesConfigDump",
            "dynamic_scoped_route_configs": [
                {"name": "scopes", "scoped_route_configs": [{"route_configuration_name": "table"}]}
            ],
        }
    )

    assert by_name == codes(found_in(config, dump)) == ["retry_policy_missing", "filter_limits_body"]


def test_unreadable_part_is_reported_and_the_rest_is_checked() -> None:
    """A value that this version has no word for makes one listener unreadable."""
    config = example_config()
    bootstrap = bootstrap_of(config)
    listener(bootstrap, "inference")["traffic_direction"] = "SIDEWAYS"
    cluster(bootstrap, "prefill")["lb_policy"] = {}

    found = found_in(config, bootstrap)

    assert [(each.code, each.place) for each in found] == [
        ("field_differs", "cluster prefill"),
        ("no_entrance", "routes"),
        ("not_read", "cluster prefill"),
        ("not_read", "listener inference"),
    ]


def test_every_code_has_a_test() -> None:
    """A rule that never finds anything would not be missed."""
    tested = {code for _, code, _ in CHANGES.values()}
    elsewhere = {
        *("not_active", "not_read", "not_live", "short_drain", "two_duplex_filters"),
        *("version_not_supported", "version_not_tested", "update_rejected", "foreign_update_rejected", "wasm_missing"),
    }

    assert tested | elsewhere == {code for code in CODES if not code.startswith("picker_")}


def test_page_of_the_documentation_lists_every_code() -> None:
    """A code in the output of the command can be looked up."""
    page = (EXAMPLES.parent / "docs/mesh/check.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)

    assert {code for row in listed for code in re.findall("`(.+?)`", row)} == CODES


def test_severity_is_error_where_requests_fail() -> None:
    """What an operator may have chosen is a warning."""
    config = example_config()
    bootstrap = bootstrap_of(config)
    manager(bootstrap).pop("delayed_close_timeout")
    assert [each.severity for each in found_in(config, bootstrap)] == [Severity.WARNING]

    route(bootstrap)["route"].pop("timeout")
    assert [each.severity for each in found_in(config, bootstrap)] == [Severity.ERROR, Severity.WARNING]
