"""Incompatible engines are never paired, because SGLang's decode engine exits at the first such request."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import FAST, body_of
from faults.fleet import ask
from patience import wait_for

PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A disaggregated pool whose engines were started with different options."""

    prefills: Sequence[EngineProcess]
    decodes: Sequence[EngineProcess]
    service: ServiceProcess
    client: httpx.Client

    @property
    def engines(self) -> Sequence[EngineProcess]:
        return (*self.prefills, *self.decodes)


@contextmanager
def run_fleet(
    prefills: Sequence[Sequence[str]], decodes: Sequence[Sequence[str]], *, has_pair: bool = True, **sections: Any
) -> Iterator[Fleet]:
    """Run an engine of each role with each of these options, the service and Envoy.

    *has_pair* is whether any two engines can be paired: the service is ready only then.
    """
    with ExitStack() as running:
        one = [EngineProcess("prefill", 2, "--dp-attention", *FAST, *options) for options in prefills]
        other = [EngineProcess("decode", 2, "--dp-attention", *FAST, *options) for options in decodes]
        for engine in (*one, *other):
            running.push(engine)
            engine.start()
        for engine in (*one, *other):
            engine.wait_until_listening()
        pool = {
            "models": ["*"],
            "prefill": {"endpoints": [engine.url for engine in one]},
            "decode": {"endpoints": [engine.url for engine in other]},
        }
        service = running.enter_context(ServiceProcess(write_config([pool], **sections)))
        envoy = running.enter_context(EnvoyProcess(service.config))
        client = running.enter_context(loopback.client(envoy.url, timeout=20))
        service.wait_until_fresh()
        if has_pair:
            service.wait_until_ready()
        else:
            wait_for(lambda: service.loads()["excluded_pairs"])
            assert loopback.CLIENT.get(f"{service.admin_url}/readyz").status_code == 503
        yield Fleet(one, other, service, client)


def pages(tokens: int) -> tuple[str, ...]:
    return ("--page-size", str(tokens))


@pytest.mark.parametrize("body_mode", ["buffered", "full_duplex_streamed"])
@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        pytest.param(pages(1), pages(2), "page_size is 1 on prefill and 2 on decode", id="page size"),
        pytest.param(
            ("--kv-cache-dtype", "bf16"),
            ("--kv-cache-dtype", "fp8_e4m3"),
            "kv_cache_dtype is bf16 on prefill and fp8_e4m3 on decode",
            id="cache type",
        ),
        pytest.param(
            ("--disaggregation-transfer-backend", "nixl"),
            (),
            "disaggregation_transfer_backend is nixl on prefill and mooncake on decode",
            id="transfer backend",
        ),
        pytest.param(
            ("--model", "one"), ("--model", "another"), "model is one on prefill and another on decode", id="model"
        ),
    ],
)
def test_a_request_is_rejected_if_no_compatible_pair_is_left(
    prefill: Sequence[str], decode: Sequence[str], reason: str, body_mode: str
) -> None:
    """The 503 has both values and the remedy; no engine gets the request, and both survive."""
    with run_fleet([prefill], [decode], has_pair=False, envoy={"body_mode": body_mode}) as fleet:
        answers = [fleet.client.post(PATH, json={"messages": [{"role": "user", "content": "hi"}]}) for _ in range(3)]
        errors = [answer.json()["error"] for answer in answers]

        assert [answer.status_code for answer in answers] == [503] * 3
        assert {(error["code"], error["type"]) for error in errors} == {("no_compatible_pair", "server_error")}
        assert all(reason in error["message"] and "start both with" in error["message"] for error in errors)
        assert all(engine.is_running and not engine.requests() for engine in fleet.engines)
        assert fleet.service.log().count("so they are never paired") == 1


def test_a_mixed_fleet_is_used_in_compatible_pairs() -> None:
    """Under load each response comes from two engines of one page size, all engines have work, and none exits."""
    with run_fleet([pages(1), pages(2)], [pages(1), pages(2)]) as fleet, ThreadPoolExecutor(32) as threads:
        sent = [threads.submit(ask, fleet.client, PATH, stream=number % 2 == 0) for number in range(200)]
        outcomes = [each.result() for each in sent]
        legs = [{body_of(record)["bootstrap_room"] for record in engine.requests()} for engine in fleet.engines]

        assert [str(outcome) for outcome in outcomes] == ["answer"] * 200
        assert all(engine.is_running for engine in fleet.engines)
        assert all(legs)
        assert (legs[0], legs[1]) == (legs[2], legs[3])


def test_a_retry_uses_a_compatible_pair() -> None:
    """If the only compatible decode engine fails, its request goes to the other pair, never across."""
    with run_fleet([pages(1), pages(2)], [pages(1), pages(2)]) as fleet, ThreadPoolExecutor(16) as threads:
        fleet.decodes[0].fault(inference="reset")
        outcomes = [each.result() for each in [threads.submit(ask, fleet.client, PATH, stream=True) for _ in range(60)]]

        assert all(engine.is_running for engine in fleet.engines)
        assert [str(outcome) for outcome in outcomes] == ["answer"] * 60


def test_a_pair_is_used_when_a_restart_makes_it_compatible() -> None:
    """A decode engine that restarts with the right page size is used, and the log reports the end of the difference."""
    with run_fleet([pages(1)], [pages(2)], has_pair=False, load={"interval": "100ms"}) as fleet:
        before = ask(fleet.client, PATH, stream=False)
        (decode,) = fleet.decodes
        decode.stop()
        wait_for(lambda: fleet.service.loads()["endpoints"][1]["failure"])
        decode.change(*pages(1))
        decode.start()
        decode.wait_until_listening()
        wait_for(lambda: not fleet.service.loads()["endpoints"][1]["failure"])

        assert str(before) == "503 no_compatible_pair"
        assert str(ask(fleet.client, PATH, stream=False)) == "answer"
        assert "no servers differ any more in that page_size is 1 on prefill and 2 on decode" in fleet.service.log()
