"""The pages of a running service show the autoscaling signals, by targets that a reload changes."""

import signal
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from patience import wait_for


def signals(service: ServiceProcess) -> dict[str, dict[str, Any]]:
    return {each["role"]: each for each in service.loads()["autoscaling"]}


def series(service: ServiceProcess) -> dict[tuple[str, str, str], float]:
    """Read the signals from the metrics page, by name, pool and role."""
    return {
        (sample.name, sample.labels["pool"], sample.labels["role"]): sample.value
        for family in text_string_to_metric_families(service.metrics())
        if family.name in {"dp_extproc_saturation_ratio", "dp_extproc_wanted_endpoints"}
        for sample in family.samples
    }


def test_pages_show_the_signals_of_each_role() -> None:
    """Each role has both series, an idle fleet wants one endpoint of each role, and a reload replaces the targets."""
    with EngineProcess("prefill", 2) as prefill, EngineProcess("decode", 2) as decode:
        pool = {"models": ["*"], "prefill": {"endpoints": [prefill.url]}, "decode": {"endpoints": [decode.url]}}
        content = write_config([pool])
        with ServiceProcess(content) as service:
            service.wait_until_fresh()
            assert series(service) == {
                ("dp_extproc_saturation_ratio", "*", "prefill"): 0.0,
                ("dp_extproc_saturation_ratio", "*", "decode"): 0.0,
                ("dp_extproc_wanted_endpoints", "*", "prefill"): 1.0,
                ("dp_extproc_wanted_endpoints", "*", "decode"): 1.0,
            }
            assert {role: set(each["measures"]) for role, each in signals(service).items()} == {
                "prefill": {"prompt_rate", "prompt_queue"},
                "decode": {"kv_cache", "requests"},
            }
            service.write(yaml.safe_dump({**content, "autoscaling": {"prefill_target": 0.5, "decode_target": 0.9}}))
            service.send_signal(signal.SIGHUP)
            wait_for(lambda: signals(service)["decode"]["target"] == 0.9)
            assert signals(service)["prefill"]["target"] == 0.5
