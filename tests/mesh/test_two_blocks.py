"""Two blocks with different prefixes work side by side in one Envoy."""

from contextlib import ExitStack
from pathlib import Path

from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.hosted import HostedEngine, HostedEngines
from e2e.stack import FAST
from mesh.platform import LLM, SHOP, Certificate, client_of, join, read_bootstrap, run_servers, token

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def test_two_blocks_serve_two_hosts_of_one_envoy(tmp_path: Path) -> None:
    """Each host gets its own fleet. The script of the page adds the bootstrap extension once."""
    certificate = Certificate.make(tmp_path)
    with ExitStack() as running:
        hosted = HostedEngines()
        engines = [hosted.add("--dp-size", "2", *FAST) for _ in range(2)]
        running.enter_context(hosted)
        services = [
            running.enter_context(_service(engine, prefix)) for engine, prefix in zip(engines, "ab", strict=True)
        ]
        for service in services:
            service.wait_until_fresh()
        first, second = (service.config for service in services)
        servers = running.enter_context(run_servers())
        bootstrap = join(read_bootstrap(first, servers, certificate), first, tmp_path)
        bootstrap = join(bootstrap, second, tmp_path, "shop")
        running.enter_context(EnvoyProcess(first, bootstrap=bootstrap))

        for host, count in ((LLM, 3), (SHOP, 5)):
            with client_of(first, certificate, host, authorization=token("team")) as client:
                statuses = [client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(count)]
            assert statuses == [200] * count

        assert bootstrap.count("name: envoy.bootstrap.internal_listener") == 1
        assert [len(engine.requests()) for engine in engines] == [3, 5]


def _service(engine: HostedEngine, prefix: str) -> ServiceProcess:
    pool = {"models": ["*"], "workers": {"endpoints": [engine.url]}}
    return ServiceProcess(write_config([pool], envoy={"name_prefix": f"{prefix}-"}))
