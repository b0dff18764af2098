"""The budget of retries holds for whatever fails, also where Envoy would repeat by itself."""

import pytest

from faults.fleet import BODIES, ask, run_fleet

CHAT, _ = BODIES


@pytest.mark.parametrize("body_mode", ["buffered", "full_duplex_streamed"])
def test_a_loss_that_cannot_be_afforded_is_not_repeated(body_mode: str) -> None:
    """The first request may be placed twice, the second one only once, though three attempts are allowed."""
    with run_fleet(
        retry={"attempts": 3, "burst": 1, "budget": 0},
        outlier_detection={"consecutive_failures": 1000},
        envoy={"body_mode": body_mode},
    ) as fleet:
        for engine in fleet.decodes:
            engine.fault(inference="reset")
        attempts = []
        for _ in range(2):
            assert str(ask(fleet.client, CHAT, stream=False)) == "503 upstream_failed"
            attempts.append(sum(len(engine.requests()) for engine in fleet.decodes))

        assert attempts == [2, 3]
