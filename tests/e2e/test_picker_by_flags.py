"""The picker as a chart starts it: by flags, with the pods of an InferencePool, behind a gateway that uses TLS."""

import json
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from dp_extproc.config import parse_config
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from dp_extproc.lab.testbed.process import CommandProcess
from dp_extproc.lab.testbed.service import write_config
from e2e.hosted import HostedEngines
from e2e.hosted_gateways import GATEWAYS, build
from e2e.stack import FAST, one
from fleet.discovery.test_kubernetes_watch import kubeconfig
from kube_api import PODS, POOLS, FakeApiServer, inference_pool, pod
from patience import wait_for

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
CHECKED = ("", "liveness", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor")
"""Names that kubelets, Envoy and GKE ask for."""


def test_flags_of_a_chart_are_all_that_a_picker_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds its endpoints, is ready by every name of a health check, and routes."""
    engines = HostedEngines()
    worker = engines.add("--dp-size", "2", *FAST)
    grpc_port, health_port, metrics_port = free_ports(3)
    flags = {"grpc-port": grpc_port, "grpc-health-port": health_port, "metrics-port": metrics_port, "pool-name": "qwen"}
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    arguments += ["--pool-namespace", "llm", "--drain-timeout", "10ms"]
    arguments += ["--zap-encoder", "json", "--config-file", "/config/plugins.yaml"]
    pages = f"http://127.0.0.1:{metrics_port}"
    listen = {"grpc": f"127.0.0.1:{grpc_port}"}
    unused = {"models": ["*"], "workers": {"endpoints": [worker.url]}}
    addresses = parse_config(yaml.safe_dump(write_config([unused], listen=listen)))
    bootstrap = yaml.safe_dump(build(GATEWAYS["envoy-ai-gateway"], addresses, [worker.port]))
    with FakeApiServer() as api, engines:
        for name, value in kubeconfig(tmp_path, api).items():
            monkeypatch.setenv(name, value)
        api.put(POOLS, inference_pool("qwen", {"app": "qwen"}, worker.port))
        api.put(PODS, pod("one", "127.0.0.1", labels={"app": "qwen"}))
        with (
            CommandProcess(arguments, f"{pages}/healthz") as picker,
            EnvoyProcess(addresses, bootstrap=bootstrap) as envoy,
            loopback.client(envoy.url) as client,
            grpc.insecure_channel(f"127.0.0.1:{health_port}") as channel,
        ):
            wait_for(lambda: loopback.CLIENT.get(f"{pages}/readyz").status_code == 200)
            check = HealthStub(channel).Check
            # The admin port answers before the others are open.
            answers = [check(HealthCheckRequest(service=name), 30, wait_for_ready=True).status for name in CHECKED]
            assert answers == [HealthCheckResponse.SERVING] * len(CHECKED)
            response = client.post("/v1/chat/completions", json=CHAT)
            assert response.status_code == 200, response.text
            assert json.loads(one([worker])["body"])["routed_dp_rank"] in {0, 1}
            assert 'inference_pool_ready_pods{name="qwen"} 1.0' in loopback.CLIENT.get(f"{pages}/metrics").text
            assert "without a meaning here: --config-file, --zap-encoder" in picker.log()
