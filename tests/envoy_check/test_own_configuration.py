"""What envoy-config prints has no findings, in any form in which an Envoy may show it."""

import asyncio
import re
from typing import Any

import pytest
import yaml

from dp_extproc.envoy_check import audit
from dp_extproc.envoy_check.reader import read_envoy
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.filters import FIRST_EVENT_FILTER
from dp_extproc.envoy_config.formats.target import Target
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from envoy_check.samples import ADMIN, POOL, Tree, bootstrap_of, config_with, dump_of, example_config, found_in

ENCRYPTED = {
    "models": ["*"],
    "prefill": {"endpoints": ["https://127.0.0.1:1"]},
    "decode": {"endpoints": ["https://127.0.0.1:2"]},
}
HEADERS_ONLY = {**POOL, "routing_fields": "headers", "policy": {"affinity": {"prefixes": False}}}


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"envoy": {"body_mode": "full_duplex_streamed"}}, id="full duplex"),
        pytest.param({"envoy": {"body_mode": "none"}, "pools": [HEADERS_ONLY]}, id="no bodies"),
        pytest.param({"envoy": {"truncated_streams": "reset", "name_prefix": "llm_"}}, id="reset and prefix"),
        pytest.param({"supervision": {"mode": "off"}, "retry": {"attempts": 1}}, id="no supervision or retries"),
        pytest.param({"prefill_leg": "service"}, id="legs of the service"),
        pytest.param({"pools": [ENCRYPTED], "engine_tls": {"ca": "/ca", "names": ["engine"]}}, id="TLS to engines"),
        pytest.param({"envoy": {"service": "router:9002", "session_header": "x-session-id"}}, id="DNS and sessions"),
    ],
)
def test_printed_bootstrap_has_no_findings(sections: dict[str, Any]) -> None:
    """As a file, as the dump of a running Envoy, and as the dump of an Envoy with a control plane."""
    config = config_with(**sections)
    bootstrap = bootstrap_of(config)

    assert found_in(config, bootstrap) == []
    assert found_in(config, dump_of(bootstrap)) == []
    assert found_in(config, dump_of(bootstrap, dynamic=True)) == []


def form(name: str) -> list[Tree]:
    """Return the printed files of a form that have whole listeners or clusters, or a bootstrap."""
    texts = FORMS[name].files(example_config(), Target()).values()
    return [document for text in texts if isinstance(document := yaml.safe_load(text), dict)]


def test_parts_have_no_findings() -> None:
    """The block and the front door are read from two files."""
    assert found_in(example_config(), *form("parts")) == []


def test_files_for_xds_have_no_findings() -> None:
    """All names of the block begin with a hash, and an earlier block stays for requests that began before."""
    documents = form("xds")
    listeners = next(each["resources"] for each in documents if len(each.get("resources", ())) == 4)
    earlier = {**listeners[1], "name": "00000000-dp_dispatch", "per_connection_buffer_limit_bytes": 1}
    assert earlier["name"].partition("-")[2] == listeners[1]["name"].partition("-")[2]
    assert found_in(example_config(), *documents, {"resources": [earlier]}) == []

    listeners[1]["per_connection_buffer_limit_bytes"] = 1
    assert [(each.code, each.place) for each in found_in(example_config(), *documents)] == [
        ("field_differs", "listener dp_dispatch: per_connection_buffer_limit_bytes")
    ]


def test_rejected_listener_of_the_files_for_xds_is_named() -> None:
    """Envoy has the cluster that leads to it, and the reason."""
    documents = form("xds")
    listeners = next(each["resources"] for each in documents if len(each.get("resources", ())) == 4)
    rejected = {"name": listeners.pop()["name"], "error_state": {"details": "no such filter"}}
    section = {"@type": f"{ADMIN}.ListenersConfigDump", "dynamic_listeners": [rejected]}

    found = found_in(example_config(), *documents, {"configs": [section]})

    assert [(each.code, each.place) for each in found] == [
        ("update_rejected", "listener decode"),
        ("listener_missing", "listener decode"),
    ]


def test_camel_case_reads_as_snake_case() -> None:
    """Programs in Go write the names of fields in camel case, and Envoy reads both."""
    config = example_config()

    assert found_in(config, _camel(dump_of(bootstrap_of(config)))) == []


def _camel(data: Any) -> Any:
    if isinstance(data, list):
        return [_camel(each) for each in data]
    if not isinstance(data, dict):
        return data
    if "json_format" in data:  # which may have any keys
        return {"jsonFormat": data["json_format"]}
    return {
        key if "." in key or key == FIRST_EVENT_FILTER else re.sub("_([a-z])", _upper, key): _camel(value)
        for key, value in data.items()
    }


def _upper(found: re.Match[str]) -> str:
    return found[1].upper()


def test_running_envoy_has_no_findings() -> None:
    """Its pages /config_dump and /server_info have everything, its version included."""
    inference, admin, grpc = (f"127.0.0.1:{port}" for port in free_ports(3))
    config = config_with(listen={"grpc": grpc}, envoy={"inference": inference, "admin": admin})
    with EnvoyProcess(config) as envoy:
        snapshot = asyncio.run(read_envoy([f"{envoy.admin_url}/config_dump"]))

    assert audit(snapshot, config) == []
    assert snapshot.version is not None
    assert snapshot.state == "LIVE"
    assert snapshot.extensions == ["InternalListener"]
