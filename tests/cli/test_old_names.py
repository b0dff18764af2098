"""Old names of keys: every command that reads the file warns on stderr, with place and remedy."""

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.lab.testbed.waiting import wait_until

WARNING = "line 1, admission.max_fill: was renamed; write max_token_ratio (the old name is read until version 1.0)"


@pytest.mark.parametrize(("command", "status"), [("envoy-config", 0), ("check", 1)])
def test_command_warns_of_an_old_name_on_stderr(tmp_path: Path, command: str, status: int) -> None:
    """The output stays the same, so that it can be piped."""
    path = tmp_path / "config.yaml"
    pools = f"pools: [{{models: ['*'], workers: {{endpoints: ['http://127.0.0.1:{free_port()}']}}}}]\n"
    path.write_text(f"admission: {{max_fill: 2}}\n{pools}")
    argv = [sys.executable, "-m", "dp_extproc", command, "-c", str(path)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    assert (result.returncode, result.stderr) == (status, f"{path}: {WARNING}\n")
    assert "max_token_ratio" not in result.stdout


def test_serve_warns_of_an_old_name_once_per_reading() -> None:
    """A worker process reads a copy of the file that its parent has read."""
    pools = [{"models": ["*"], "workers": {"endpoints": [f"http://127.0.0.1:{free_port()}"]}}]
    content = {"admission": {"max_fill": 2}, **write_config(pools, listen={"workers": 2})}
    with ServiceProcess(content) as service:
        service.write(yaml.safe_dump(content, sort_keys=False))

        def warnings(count: int) -> None:
            wait_until(lambda: service.log().count("max_token_ratio") == count, 20, service.log)

        wait_until(lambda: service.log().count("ext_proc on") == 2, 20, service.log)
        warnings(1)
        service.send_signal(signal.SIGHUP)
        wait_until(
            lambda: 'config_reloads_total{outcome="applied"} 1.0' in httpx.get(f"{service.admin_url}/metrics").text,
            20,
            service.log,
        )
        warnings(2)
        assert f"config.yaml: line 2, {WARNING.partition(', ')[2]}" in service.log()
