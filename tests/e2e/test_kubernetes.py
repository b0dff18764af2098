"""All engines are replaced by events of Kubernetes, through real Envoy and under load; no request fails."""

import json
from pathlib import Path

import pytest

from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST
from e2e.steady_load import LATE, Departures, steady_load
from kube_api import SLICES, TOKEN, FakeApiServer, Manifest, endpoint_slice
from patience import wait_for

ROLES = ("prefill", "decode")


def slice_of(role: str, engine: HostedEngine, **conditions: bool) -> Manifest:
    """Write the slice of one engine: its port differs from those of the others."""
    manifest = endpoint_slice(f"{role}-{engine.port}", role, "127.0.0.1", port=engine.port, **conditions)
    manifest["endpoints"][0]["targetRef"] |= {"uid": f"uid-{engine.port}", "name": f"{role}-{engine.port}"}
    manifest["ports"].append({"name": "bootstrap", "port": engine.bootstrap_port, "protocol": "TCP"})
    return manifest


def has_ended(engine: HostedEngine) -> bool:
    return all(each["outcome"] != "running" for each in engine.requests())


def test_a_rolling_replacement_of_all_engines_fails_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each old engine is not ready, then terminating, then gone. A second after the first event it gets no request."""
    hosted = HostedEngines()
    flags = ("--dp-attention", "--dp-size", "2", *FAST)
    engines = {role: [hosted.add("--role", role, *flags) for _ in range(4)] for role in ROLES}
    pool = {"models": ["*"], **{role: {"kubernetes": {"service": role}} for role in ROLES}}
    with FakeApiServer() as api:
        kubeconfig = {
            "clusters": [{"name": "c", "cluster": {"server": api.url}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}],
            "current-context": "x",
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig), encoding="utf-8")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        for role in ROLES:
            for engine in engines[role][:2]:
                api.put(SLICES, slice_of(role, engine))
        with hosted, ServiceProcess(write_config([pool])) as service, EnvoyProcess(service.config) as envoy:
            service.wait_until_fresh()
            service.wait_until_ready()

            def fresh() -> set[str]:
                return {each["url"] for each in service.loads()["endpoints"] if each["state"] == "fresh"}

            departures = Departures()
            with steady_load(envoy.url) as load:
                for old, new in ((0, 2), (1, 3)):
                    leaves = {role: engines[role][old] for role in ROLES}
                    for role in ROLES:
                        api.put(SLICES, slice_of(role, engines[role][new]))
                    wait_for(lambda new=new: fresh() >= {engines[role][new].url for role in ROLES}, 30)  # type: ignore[misc]
                    departures.left(*leaves.values())
                    for role, engine in leaves.items():
                        api.put(SLICES, slice_of(role, engine, ready=False, serving=True))
                    load.go_on(LATE)
                    for role, engine in leaves.items():
                        api.put(SLICES, slice_of(role, engine, ready=False, serving=True, terminating=True))
                    load.go_on()
                    for role, engine in leaves.items():
                        wait_for(lambda engine=engine: has_ended(engine))  # type: ignore[misc]
                        api.delete(SLICES, f"{role}-{engine.port}")
                        hosted.close(engine)
                    load.go_on()
            load.check()
            departures.check()
            service.wait_until_idle()
            assert fresh() == {engine.url for role in ROLES for engine in engines[role][2:]}
            assert all(engine.requests() for role in ROLES for engine in engines[role])
