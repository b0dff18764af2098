"""One Envoy per body mode in front of a scripted service and two recording engines."""

from collections.abc import Iterator

import httpx
import pytest

from dp_extproc.config import BodyMode
from dp_extproc.testbed.envoy import EnvoyProcess
from dp_extproc.testbed.ports import free_ports
from envoy_config.harness import Bench, make_config, scripted_bootstrap
from envoy_config.recording_engine import run_engine
from envoy_config.scripted_service import run_service


@pytest.fixture(scope="module", params=[BodyMode.BUFFERED, BodyMode.DUPLEX])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    ports = free_ports(3)
    config = make_config(request.param, ports)
    with (
        run_engine("prefill") as prefill,
        run_engine("decode") as decode,
        run_service(prefill.address, decode.address, ports[2]) as service,
        EnvoyProcess(config, bootstrap=scripted_bootstrap(config)) as envoy,
        httpx.Client(base_url=envoy.url, timeout=60, trust_env=False) as client,
    ):
        yield Bench(config, envoy, service, prefill, decode, client)
