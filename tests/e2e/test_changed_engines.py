"""Another engine, or the same one in another role, behind an address that stays, through real Envoy and under load."""

from contextlib import ExitStack

import httpx

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.forwarder import Forwarder
from e2e.load import SHORT
from e2e.stack import FAST, body_of, start_engines
from e2e.steady_load import WHOLE, steady_load
from patience import wait_for

FAST_ENGINE = ("--dp-attention", *FAST)


def test_no_request_fails_when_another_engine_comes_to_stand_behind_an_address() -> None:
    """It has half of the ranks and another bootstrap port; ranks that it has not are never the client's 400."""
    with ExitStack() as running:
        (old, beside), (decode,) = start_engines(running, 2, 1, *FAST_ENGINE)
        new = running.enter_context(EngineProcess("prefill", 2, *FAST_ENGINE))
        address = running.enter_context(Forwarder(old.url))
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [{"url": address.url, "bootstrap_host": "127.0.0.1"}, beside.url]},
            "decode": {"endpoints": [decode.url]},
        }
        # Rounds that are far apart leave the discovery to the requests, unless a page is late.
        load_settings = {"interval": "5s", "stale_after": "60s", "timeout": "4s"}
        service = running.enter_context(ServiceProcess(write_config([pool], load=load_settings)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        service.wait_until_fresh()
        client = running.enter_context(httpx.Client(base_url=envoy.url, timeout=60, trust_env=False))
        for _ in range(20):
            assert client.post("/generate", json=WHOLE).status_code == 200
        assert old.requests()
        address.switch(new.url)
        old.stop()

        def is_found() -> bool:
            assert {client.post("/generate", json=WHOLE).status_code for _ in range(20)} == {200}
            return len(new.requests()) > 20

        wait_for(is_found, 60.0)
        served = [body_of(each) for each in new.requests()]
        assert {each["bootstrap_port"] for each in served[-3:]} == {new.bootstrap_port}
        assert {each["routed_dp_rank"] for each in served[-20:]} <= {0, 1}


def test_engine_that_takes_another_role_leaves_its_pool() -> None:
    """It is said in the log, and no request fails."""
    with ExitStack() as running:
        (first, second), (decode,) = start_engines(running, 2, 1, *FAST_ENGINE, "--enable-pd-role-switch")
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [first.url, second.url]},
            "decode": {"endpoints": [decode.url]},
        }
        service = running.enter_context(ServiceProcess(write_config([pool])))
        envoy = running.enter_context(EnvoyProcess(service.config))
        service.wait_until_fresh()
        service.wait_until_ready()
        assert httpx.post(f"{envoy.url}/generate", json=SHORT, trust_env=False).status_code == 200
        wait_for(lambda: httpx.post(f"{first.url}/pd_role_switch", json={"new_role": "decode"}).status_code == 200)
        wait_for(lambda: f"{first.url}: disagreement: its disaggregation_mode is decode" in service.log(), 5.0)
        first.forget()
        with steady_load(envoy.url) as load:
            load.go_on()
        load.check()
        assert first.requests() == []
