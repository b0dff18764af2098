"""Engines that end in good order while a list still names them, through real Envoy."""

import signal
import time

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import PATIENCE
from e2e.steady_load import steady_load
from patience import wait_for


def test_engine_that_terminates_is_avoided_before_it_ends() -> None:
    """It reports that it is not ready, and serves for some seconds more; no request is retried."""
    options = ("--dp-attention", "--drain", "5", *PATIENCE)
    with EngineProcess("unified", 2, *options) as first, EngineProcess("unified", 2, *options) as second:
        pool = {"models": ["*"], "workers": {"endpoints": [first.url, second.url]}}
        with ServiceProcess(write_config([pool])) as service, EnvoyProcess(service.config) as envoy:
            service.wait_until_fresh()
            with steady_load(envoy.url) as load:
                first.send_signal(signal.SIGTERM)
                wait_for(lambda: f"{first.url}: not_ready" in service.log())
                avoided = time.time()
                load.go_on(0.5)
                late = [each for each in first.requests() if each["received_at"] > avoided + 0.5]
                wait_for(lambda: not first.is_running, 30.0)
                load.go_on()
            load.check()
            service.wait_until_idle()
            assert late == []
            assert "dp_extproc_leg_failures_total{" not in service.metrics()
