"""The printed configuration is valid for Envoy, has comments, and equals the committed example."""

import argparse
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap

from certificates import Authority
from dp_extproc.cli import envoy_config as command
from dp_extproc.config import BodyMode, Config, TruncatedStreams
from dp_extproc.envoy_config import build_bootstrap, render_yaml, secret_files, yaml_text
from dp_extproc.lab.testbed.envoy import find_envoy
from envoy_config.harness import POOLS

EXAMPLE = Path(__file__).parents[2] / "envoy"


def config_with(envoy: dict[str, Any] | None = None, grpc: str = "127.0.0.1:9002") -> Config:
    pool = POOLS[(envoy or {}).get("body_mode", BodyMode.BUFFERED)]
    return Config.model_validate({"listen": {"grpc": grpc}, "envoy": envoy or {}, "pools": [pool]})


def printed(config: Config) -> Any:
    return yaml.safe_load(render_yaml(build_bootstrap(config)))


def named(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(item for item in items if item["name"] == name)


def test_committed_example_equals_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """envoy/envoy.yaml is printed from envoy/dp-extproc.yaml, comments included."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    status = command.run(parser.parse_args(["-c", str(EXAMPLE / "dp-extproc.yaml")]))

    assert status == 0
    assert capsys.readouterr().out == (EXAMPLE / "envoy.yaml").read_text(encoding="utf-8")


def test_command_reports_a_bad_file_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output stays empty, so that nothing can be taken for a configuration."""
    path = tmp_path / "bad.yaml"
    path.write_text("pools: []\nlisten: {grpc: nowhere}\n", encoding="utf-8")

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    status = command.run(parser.parse_args(["--config", str(path)]))

    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "listen.grpc" in err


@pytest.mark.parametrize("service", [None, "dp-extproc.example:9002", "[::1]:9002"])
@pytest.mark.parametrize("body_mode", list(BodyMode))
def test_envoy_accepts_the_printed_configuration(body_mode: BodyMode, service: str | None, tmp_path: Path) -> None:
    """``envoy --mode validate`` reports neither an error nor a deprecated field."""
    path = tmp_path / "envoy.yaml"
    path.write_text(
        render_yaml(build_bootstrap(config_with({"body_mode": body_mode, "service": service}))), encoding="utf-8"
    )

    done = subprocess.run(
        [find_envoy(), "--mode", "validate", "-c", str(path)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower()


@pytest.mark.parametrize("truncated_streams", list(TruncatedStreams))
def test_decode_responses_pass_the_filter_if_truncated_streams_get_an_event(
    truncated_streams: TruncatedStreams, tmp_path: Path
) -> None:
    """With ``reset`` the cluster dials the endpoint in the header itself, without the filter's listener."""
    config = config_with({"truncated_streams": truncated_streams.value})
    resources = printed(config)["static_resources"]
    path = tmp_path / "envoy.yaml"
    path.write_text(render_yaml(build_bootstrap(config)), encoding="utf-8")

    done = subprocess.run(
        [find_envoy(), "--mode", "validate", "-c", str(path)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    ends = truncated_streams is TruncatedStreams.ERROR_EVENT
    assert ("decode" in [each["name"] for each in resources["listeners"]]) is ends
    assert ("decode_server" in [each["name"] for each in resources["clusters"]]) is ends
    assert ("original_dst_lb_config" in named(resources["clusters"], "decode")) is not ends


class Attached(dict[int, Mapping[str, str]]):
    """The comments that builders attach, with a record that outlasts the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.record: list[tuple[str, str]] = []

    def __setitem__(self, message: int, comments: Mapping[str, str]) -> None:
        self.record += comments.items()
        super().__setitem__(message, comments)


def test_every_comment_of_a_builder_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment would be lost if its field had another name or were not printed."""
    attached = Attached()
    monkeypatch.setattr(yaml_text, "_comments", attached)
    lines = [line.strip() for line in render_yaml(build_bootstrap(config_with())).splitlines()]

    missing = [
        place
        for place, comment in attached.record
        if any(f"# {row}".rstrip() not in lines for row in comment.splitlines())
    ]

    assert missing == []
    assert len(attached.record) > 50


def test_comments_do_not_change_the_parsed_configuration() -> None:
    """Text with comments and text without them parse to the same data."""
    bootstrap = build_bootstrap(config_with())

    bare = Bootstrap.parse(bytes(bootstrap))
    assert yaml.safe_load(render_yaml(bootstrap)) == yaml.safe_load(render_yaml(bare))
    assert "# " not in render_yaml(bare)


@pytest.mark.parametrize(
    ("service", "grpc", "kind", "address"),
    [
        pytest.param(None, "10.0.0.9:9002", "STATIC", ("10.0.0.9", 9002), id="listen address"),
        pytest.param(None, "0.0.0.0:9102", "STATIC", ("127.0.0.1", 9102), id="wildcard becomes loopback"),
        pytest.param(None, "[::]:9102", "STATIC", ("::1", 9102), id="IPv6 wildcard becomes loopback"),
        pytest.param("10.0.0.8:9002", "0.0.0.0:1", "STATIC", ("10.0.0.8", 9002), id="IP"),
        pytest.param("[fd00::1]:9002", "0.0.0.0:1", "STATIC", ("fd00::1", 9002), id="IPv6"),
        pytest.param("router:9002", "0.0.0.0:1", "STRICT_DNS", ("router", 9002), id="name"),
    ],
)
def test_service_cluster_has_the_address_that_envoy_can_reach(
    service: str | None, grpc: str, kind: str, address: tuple[str, int]
) -> None:
    """A wildcard of ``listen.grpc`` becomes the loopback address, and a name is resolved by DNS."""
    clusters = printed(config_with({"service": service}, grpc))["static_resources"]["clusters"]

    cluster = named(clusters, "extproc")
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    socket_address = endpoint["address"]["socket_address"]
    assert (cluster["type"], socket_address["address"], socket_address["port_value"]) == (kind, *address)


def test_every_hop_buffers_the_largest_body_and_the_routing_fields() -> None:
    """The limit of each listener and cluster follows from max_body_bytes."""
    resources = printed(config_with({"max_body_bytes": 5 << 20}))["static_resources"]

    hops = [*resources["listeners"], *resources["clusters"]]
    assert {hop["name"]: hop["per_connection_buffer_limit_bytes"] for hop in hops} == {
        hop["name"]: 6 << 20 for hop in hops
    }
    assert len(hops) == 11


def test_grpc_clusters_send_keepalive_pings() -> None:
    """Envoy pings each process of the service at the interval at which the service pings Envoy."""
    listen = {"listen": {"keepalive": "3s"}, "pools": [POOLS[BodyMode.BUFFERED]]}
    clusters = printed(Config.model_validate(listen))["static_resources"]["clusters"]

    http2 = {each["name"]: found for each in clusters if (found := _http2_options(each)) is not None}
    assert {name: options["connection_keepalive"] for name, options in http2.items()} == {
        name: {"interval": "3s", "timeout": "3s"} for name in ("extproc", "extproc_owner")
    }


def _http2_options(cluster: dict[str, Any]) -> dict[str, Any] | None:
    (options,) = cluster.get("typed_extension_protocol_options", {"": {}}).values()
    found: dict[str, Any] | None = options.get("explicit_http_config", {}).get("http2_protocol_options")
    return found


@pytest.mark.parametrize(
    ("envoy", "listen", "watched"),
    [
        pytest.param({}, {}, False, id="one process"),
        pytest.param({"service": "10.0.0.8:9002"}, {}, False, id="one address"),
        pytest.param({"service": "router:9002"}, {}, True, id="a name, which may stand for several"),
        pytest.param({}, {"workers": 2}, True, id="workers"),
        pytest.param({"standby": ["10.0.0.9:9002"]}, {}, True, id="standby"),
    ],
)
def test_service_cluster_ejects_a_dead_process_if_there_may_be_another(
    envoy: dict[str, Any], listen: dict[str, Any], watched: bool
) -> None:
    """Envoy checks the health of each process, ejects a dead one at once, and opens the refused stream elsewhere."""
    config = config_with(envoy)
    config = config.model_copy(update={"listen": config.listen.model_copy(update=listen)})
    text = render_yaml(build_bootstrap(config))
    cluster = named(yaml.safe_load(text)["static_resources"]["clusters"], "extproc")

    assert ("health_checks" in cluster) is watched
    assert ("outlier_detection" in cluster) is watched
    assert ("envoy.retry_host_predicates.previous_hosts" in text) is watched


@pytest.mark.parametrize(
    ("envoy", "secrets"),
    [
        ({"secrets": "/secrets", "truncated_streams": "reset"}, {"engines-ca", "engines-certificate"}),
        ({"secrets": "/secrets", "engine_tls": {"sds": {"cluster": "extproc", "ca": "a", "certificate": "b"}}}, set()),
        ({"engine_tls": {"ca": "/elsewhere/ca.pem"}}, set()),
    ],
)
def test_envoy_accepts_tls_towards_engines(envoy: dict[str, Any], secrets: set[str], tmp_path: Path) -> None:
    """Both clusters that dial engines have it, with each source of certificates. The internal hops have none."""
    own = Authority.found(tmp_path)
    tls = {"ca": own.ca, "names": ["engine.test", "spiffe://a/b"], **own.issue("client")}
    if "secrets" in envoy:
        envoy = {**envoy, "secrets": str(tmp_path)}
    else:
        moved = Path(own.ca).rename(tmp_path / "envoy-ca.pem")
        envoy = {**envoy, "engine_tls": {"ca": str(moved)}}
    pool = {"models": ["*"], "workers": {"endpoints": ["https://127.0.0.1:1"]}}
    config = Config.model_validate({"envoy": envoy, "engine_tls": tls, "pools": [pool]})
    for name, text in secret_files(config).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    path = tmp_path / "envoy.yaml"
    path.write_text(render_yaml(build_bootstrap(config)), encoding="utf-8")
    argv = [find_envoy(), "--mode", "validate", "-c", str(path)]

    done = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower()
    assert secret_files(config).keys() == {f"secret-{name}.yaml" for name in secrets}
    clusters = printed(config)["static_resources"]["clusters"]
    kinds = {each["name"]: each.get("transport_socket", {}).get("name", "").rpartition(".")[2] for each in clusters}
    last = "decode" if envoy.get("truncated_streams") == "reset" else "decode_server"
    assert {name for name, kind in kinds.items() if kind == "tls"} == {"prefill", last}
