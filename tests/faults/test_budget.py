"""The retry budget limits all retries, also those that Envoy would make by itself."""

import pytest

from faults.fleet import BODIES, ask, run_fleet

CHAT, _ = BODIES


@pytest.mark.parametrize("body_mode", ["buffered", "full_duplex_streamed"])
def test_a_failed_request_is_not_retried_with_an_empty_budget(body_mode: str) -> None:
    """The first request may be scheduled twice and the second only once, although three attempts are allowed."""
    with run_fleet(
        retry={"attempts": 3, "burst": 1, "budget": 0},
        outlier_detection={"consecutive_failures": 1000},
        envoy={"body_mode": body_mode},
    ) as fleet:
        for engine in fleet.decodes:
            engine.fault(inference="reset")
        attempts = []
        for name in ("first", "second"):  # the same request again would wait until its engines are known to live
            assert str(ask(fleet.client, CHAT, stream=False, user=name)) == "503 upstream_failed"
            attempts.append(sum(len(engine.requests()) for engine in fleet.decodes))

        assert attempts == [2, 3]
