"""A fleet is upgraded engine by engine to a release whose bootstrap protocol is another, under load, through Envoy."""

import signal
from collections.abc import Sequence

from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.service import ServiceProcess
from e2e.stack import run_stack
from e2e.steady_load import steady_load
from patience import wait_for

OLD, NEW = "0.5.9", "0.5.23"
FREQUENT = {"interval": "200ms", "stale_after": "5s"}


def upgrade(engine: EngineProcess, service: ServiceProcess) -> None:
    """Drain an engine by SIGTERM, start it as the new release, and wait until it is in use."""
    engine.send_signal(signal.SIGTERM)
    wait_for(lambda: not engine.is_running, 30.0)
    engine.change("--sglang-version", NEW)
    engine.start()
    engine.wait_until_listening()
    wait_for(lambda: NEW in {each["version"] for each in service.loads()["endpoints"] if each["url"] == engine.url})
    service.wait_until_fresh()


def pairs(service: ServiceProcess) -> set[tuple[Sequence[str], Sequence[str]]]:
    return {(tuple(each["prefill"]), tuple(each["decode"])) for each in service.loads()["excluded_pairs"]}


def test_no_request_fails_while_a_fleet_is_upgraded() -> None:
    """No engine of one release gets a request with an engine of the other: decode would never find prefill."""
    with (
        run_stack(OLD, prefills=2, decodes=2, options=("--drain", "0.2"), load=FREQUENT) as stack,
        steady_load(stack.envoy.url) as load,
    ):
        (p1, p2), (d1, d2) = stack.prefills, stack.decodes
        for engine in (p1, d1):
            upgrade(engine, stack.service)
            load.go_on()
        assert pairs(stack.service) == {((p1.url,), (d2.url,)), ((p2.url,), (d1.url,))}
        assert all(engine.requests() for engine in (p1, d1))
        for engine in (p2, d2):
            upgrade(engine, stack.service)
            load.go_on()
        assert not pairs(stack.service)
        load.is_over = True
        wait_for(lambda: load.results.total() == load.sent)
        load.check()
        assert "release is 0.5.23 on prefill and 0.5.9 on decode" in stack.service.log()
