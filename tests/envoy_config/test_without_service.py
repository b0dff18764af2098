"""Envoy without the service, and with a Lua script that fails."""

import httpx
import pytest

from dp_extproc import contract
from dp_extproc.config import BodyMode
from dp_extproc.envoy_config import build_bootstrap, render_yaml
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from envoy_config.harness import BODY, error_of, make_config
from envoy_config.recording_engine import run_engine
from envoy_config.scripted_service import run_service


@pytest.mark.parametrize("body_mode", list(BodyMode))
def test_request_gets_a_503_without_the_service(body_mode: BodyMode) -> None:
    """The filter fails open and the routes fail closed. Requests pass once the service runs."""
    ports = free_ports(3)
    with (
        run_engine("decode") as decode,
        EnvoyProcess(make_config(body_mode, ports)) as envoy,
        loopback.client(envoy.url) as client,
    ):
        named = {contract.DECODE_HOST: decode.address, contract.PREFILL_HOST: decode.address}
        refused = client.post("/v1/completions", content=BODY, headers=named)
        assert refused.status_code == 503
        assert error_of(refused)["code"] == "service_unavailable"
        assert decode.received == []

        with run_service(decode.address, decode.address, ports[2]):
            answer = client.post("/v1/completions", content=BODY, headers={"test-one-server": "1"})
            # The scripted service makes no decision without the body.
            assert answer.status_code == (503 if body_mode is BodyMode.NONE else 200)


def test_prefill_leg_is_not_forwarded_if_its_script_fails() -> None:
    """Envoy forwards a request whose Lua script fails, so the route has to refuse it."""
    ports = free_ports(3)
    config = make_config(BodyMode.BUFFERED, ports)
    printed = render_yaml(build_bootstrap(config))
    broken = printed.replace("local rest =", 'error("out of memory") local rest =')
    assert broken != printed
    with (
        run_engine("prefill") as prefill,
        run_engine("decode") as decode,
        run_service(prefill.address, decode.address, ports[2]) as service,
        EnvoyProcess(config, bootstrap=broken) as envoy,
    ):
        headers = {"x-request-id": "of the test"}
        answer = httpx.post(f"{envoy.url}/v1/completions", content=BODY, headers=headers, trust_env=False)
        assert answer.status_code == 200
        statuses = {line["leg"]: line["status"] for line in envoy.wait_for_access_log("of the test", 2)}

    assert statuses == {"main": 200, "prefill": 500}
    assert prefill.received == []
    assert [report.status for report in service.prefill_reports] == ["500"]


def test_running_response_continues_after_a_crash_of_the_service() -> None:
    """A stream that has begun is not truncated if the service crashes.

    This holds in buffered mode only. In full duplex mode Envoy 1.40 never fails open after it has sent a body.
    """
    ports = free_ports(3)
    with (
        run_engine("decode") as decode,
        EnvoyProcess(make_config(BodyMode.BUFFERED, ports)) as envoy,
        loopback.client(envoy.url) as client,
    ):
        with run_service(decode.address, decode.address, ports[2]) as service:
            headers = {"test-one-server": "1", "x-request-id": "of the test"}
            request = client.build_request("POST", "/stream", content=BODY, headers=headers)
            response = client.send(request, stream=True)
            chunks = response.iter_bytes()
            first = next(chunks)
            assert len(service.seen_headers) == 1

        decode.may_finish.set()
        assert (first, b"".join(chunks)) == (b"first", b"last")
