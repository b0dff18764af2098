"""``dp-extproc picker``: the flags of the reference endpoint picker make a configuration."""

import argparse
from typing import Any

import pytest

from dp_extproc.cli import main, picker
from dp_extproc.cli.picker import add_arguments
from dp_extproc.config import Config, ConfigError, Protocol

CHART = (
    "--pool-name qwen --pool-namespace llm --pool-group inference.networking.k8s.io --zap-encoder json "
    "--config-file /config/plugins.yaml --grpc-health-port 9003 --v=4 --tracing=false --ha-enable-leader-election"
)
"""What charts of the reference picker pass."""


def loaded(line: str, warnings: list[str] | None = None, namespace: str = "") -> Config:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    warned: list[str] = []
    found = picker._load(parser.parse_args(line.split()), warned.append, namespace)
    if warnings is None:
        assert warned == []
    else:
        warnings += warned
    return found.config


def sources(config: Config) -> list[dict[str, Any]]:
    (pool,) = config.pools
    assert pool.workers is not None
    return [each.model_dump(exclude_defaults=True) for each in pool.workers.kubernetes]


def test_flags_of_a_chart_make_a_picker_of_its_pool() -> None:
    """Flags without a meaning are named in one warning. TLS is on, as in the reference picker."""
    warnings: list[str] = []
    config = loaded(CHART, warnings)

    assert config.protocol is Protocol.ENDPOINT_PICKER
    assert sources(config) == [{"inference_pool": "qwen", "namespace": "llm"}]
    assert config.pools[0].models == ("*",)
    listen = config.listen
    assert (str(listen.grpc), str(listen.health), str(listen.admin)) == ("0.0.0.0:9002", "0.0.0.0:9003", "0.0.0.0:9090")
    assert listen.tls is not None
    assert listen.tls.self_signed
    assert warnings == [
        "without a meaning here: --config-file, --ha-enable-leader-election, --tracing, --v, --zap-encoder"
    ]


def test_pods_may_be_selected_without_a_pool() -> None:
    """Each port of a pod is an endpoint of its own; one that is repeated counts once."""
    line = "--endpoint-selector app=qwen,tier!=dev --endpoint-target-ports 8000,8001,8000 --secure-serving=false"
    config = loaded(f"{line} --model a b --drain-timeout 1m30s --grpc-port 7002", namespace="llm")

    assert sources(config) == [
        {"pods": "app=qwen,tier!=dev", "port": port, "namespace": "llm"} for port in (8000, 8001)
    ]
    assert (config.pools[0].models, config.drain, config.listen.tls) == (("a", "b"), 90.0, None)
    assert str(config.listen.grpc) == "0.0.0.0:7002"


def test_an_empty_value_counts_as_none() -> None:
    """Charts pass every flag, also those of which nothing is set."""
    config = loaded("--pool-name qwen --endpoint-selector= --pool-namespace= --cert-path= --grpc-port=", None, "llm")

    assert sources(config) == [{"inference_pool": "qwen", "namespace": "llm"}]
    assert config.listen.tls is not None
    assert config.listen.tls.self_signed
    assert config.listen.grpc.port == 9002


def test_the_certificate_may_be_in_files() -> None:
    """The names are those of a Secret of Kubernetes."""
    tls = loaded("--pool-name qwen --cert-path /certs").listen.tls

    assert tls is not None
    assert tls.files == {"cert": "/certs/tls.crt", "key": "/certs/tls.key"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "--pool-name, --endpoint-selector: give one of them"),
        ("--pool-name a --endpoint-selector b=c", "--pool-name, --endpoint-selector: give one of them"),
        ("--endpoint-selector b=c", "--endpoint-target-ports: write the ports"),
        ("--endpoint-selector b=c --endpoint-target-ports 8000,x", "--endpoint-target-ports: write the ports"),
        ("--pool-name= --endpoint-selector=", "--pool-name, --endpoint-selector: give one of them"),
        ("--pool-name a --pool-group inference.networking.x-k8s.io", "--pool-group: only inference.networking.k8s.io"),
        ("--pool-name a --secure-serving=perhaps", "--secure-serving: write true or false"),
        ("--pool-name a --grpc-port x", "listen.grpc: write an IP address and a port"),
        ("--pool-name a --drain-timeout 1year", "drain: write a duration"),
    ],
)
def test_flags_that_make_no_sense_are_refused(line: str, expected: str) -> None:
    """The message names the flag or the key, and what to write."""
    with pytest.raises(ConfigError) as refused:
        loaded(line)

    assert expected in str(refused.value)


@pytest.mark.parametrize(
    "line",
    ["--pool-name qwen --grpc-port 1", "--grpc-port=1 --endpoint-selector qwen", "-v=4 --pool-name=qwen --grpc-port 1"],
)
def test_flags_alone_start_the_picker(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """An image is started with the flags of a chart, and without the name of a command."""
    given: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        given.append(args)
        return 0

    monkeypatch.setattr(picker, "run", run)
    assert main(line.split()) == 0
    assert (given[0].pool_name or given[0].endpoint_selector, given[0].grpc_port) == ("qwen", "1")
