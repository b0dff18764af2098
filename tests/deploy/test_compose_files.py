"""docker-compose.yml and the configurations beside it are valid, as far as a test without containers can check."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dp_extproc.config import Config, ConfigFile, parse_config
from dp_extproc.envoy_config import build_bootstrap, render_yaml

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))[
    "services"
]
ROUTERS = {"dp-extproc.yaml": "dp-extproc", "baseline.yaml": "dp-extproc-baseline"}
CONFIGURATIONS = ROOT / "deploy/compose/dp-extproc"
ENGINES = ("prefill", "decode")


def load_config(path: Path) -> Config:
    return parse_config(ConfigFile(path).read(), str(path))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_least_privileges(name: str) -> None:
    """No container has capabilities, a writable root file system, or a port open to the network."""
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("read_only") is (None if name == "grafana" else True)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "build" not in service])
def test_pulled_images_are_pinned(name: str) -> None:
    """The tested images are the ones that run."""
    assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


@pytest.mark.parametrize("file", ROUTERS)
def test_configuration_names_services_of_the_compose_file(file: str) -> None:
    """Otherwise only a new user would notice a name that does not exist."""
    config = load_config(CONFIGURATIONS / file)
    assert config.envoy.service == f"{ROUTERS[file]}:{config.listen.grpc.port}"
    assert ROUTERS[file] in SERVICES
    (pool,) = config.pools
    assert pool.prefill is not None
    assert pool.decode is not None
    assert [(each.name, each.port) for role in (pool.prefill, pool.decode) for each in role.dns] == [
        (f"{engine}.", 30000) for engine in ENGINES
    ]
    assert set(ENGINES) <= SERVICES.keys()
    assert all("--port 30000" in SERVICES[engine]["command"] for engine in ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_removed_engine_has_time_to_end_its_requests(engine: str) -> None:
    """Compose sends SIGTERM when it scales down. By default it kills the container 10 s later."""
    service = SERVICES[engine]
    assert "--drain" in service["command"]
    assert int(service["stop_grace_period"].removesuffix("s")) >= 30
    assert service["deploy"]["replicas"] == 2


@pytest.mark.parametrize("file", ROUTERS)
def test_printed_envoy_configuration_finds_the_service_by_its_name(file: str) -> None:
    """A restarted container may get another address, and only a name that Envoy resolves follows it."""
    bootstrap = yaml.safe_load(render_yaml(build_bootstrap(load_config(CONFIGURATIONS / file))))
    (cluster,) = [each for each in bootstrap["static_resources"]["clusters"] if each["name"] == "extproc"]
    assert cluster["type"] == "STRICT_DNS"
    assert cluster["health_checks"]
    assert ROUTERS[file] in str(cluster["load_assignment"])


def test_routers_differ_only_in_their_policy() -> None:
    """Otherwise the tables of the load generator would also compare something else."""
    ours, baseline = (load_config(CONFIGURATIONS / file) for file in ROUTERS)
    alike = {"reload": ours.reload, "envoy": ours.envoy}
    policy = {"pools": tuple(pool.model_copy(update={"policy": baseline.pools[0].policy}) for pool in ours.pools)}
    assert ours.model_copy(update=policy) == baseline.model_copy(update=alike)
    assert (baseline.pools[0].policy.host, baseline.pools[0].policy.dp_rank) == ("random", "none")


def test_no_two_services_build_the_same_image() -> None:
    """Compose builds all images at once, and the second export of a name fails."""
    names = [each["image"] for each in SERVICES.values() if "build" in each and "image" in each]
    assert names
    assert len(names) == len(set(names))
