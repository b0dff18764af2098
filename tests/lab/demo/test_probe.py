"""Sample engines that do not answer as they should."""

import asyncio
from collections.abc import Callable

import pytest

from dp_extproc.lab.demo.probe import LoadProbe, watch
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.ports import free_port


async def _watch(urls: dict[str, str], enough: Callable[[LoadProbe], bool]) -> LoadProbe:
    probe = LoadProbe()
    async with asyncio.timeout(30), watch(urls, probe):
        while not enough(probe):  # noqa: ASYNC110 - the probe has no event, it only counts
            await asyncio.sleep(0.01)
    return probe


@pytest.mark.parametrize("fault", ["hang", "500", "garbage", "reset", "noise", "short"])
def test_probe_goes_on_if_a_sample_fails(fault: str) -> None:
    """Each failed sample is counted with its reason, and other engines are sampled."""
    with EngineProcess("prefill", 2) as sick, EngineProcess("decode", 2) as well:
        sick.fault(loads={"kind": fault, "times": 1})
        urls = {"prefill 1": sick.url, "decode 1": well.url, "decode 2": f"http://127.0.0.1:{free_port()}"}
        probe = asyncio.run(
            _watch(
                urls,
                lambda probe: (
                    bool(probe.failed.get("prefill 1"))
                    and bool(probe.samples.get("prefill 1"))
                    and bool(probe.failed.get("decode 2"))
                ),
            )
        )

    assert probe.failed["prefill 1"] == 1
    assert probe.reasons["prefill 1"]
    assert probe.samples["decode 1"] > 0
    assert "decode 1" not in probe.failed
    assert probe.failed_share("decode 2") == 1.0
    assert probe.mean_tokens("decode 2", 0) is None
    assert probe.imbalance(["decode 2"]) is None


def test_failed_samples_do_not_count_as_empty_ranks() -> None:
    """The average is over the samples that succeeded, of each engine apart."""
    probe = LoadProbe()
    probe.note("prefill 1", {0: 100, 1: 300})
    probe.note_failure("prefill 1", "timeout")
    probe.note("prefill 2", {0: 10, 1: 10})
    probe.note("prefill 2", {0: 10, 1: 10})

    assert probe.mean_tokens("prefill 1", 1) == 300
    assert probe.mean_tokens("prefill 2", 1) == 10
    assert probe.imbalance(["prefill 1"]) == 1.5
    assert probe.failed_share("prefill 1") == 0.5
