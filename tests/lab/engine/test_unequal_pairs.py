"""Connect two engines that were started with different options: what SGLang does then, release by release."""

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import FAST, Pair, text_of
from patience import wait_for


@contextmanager
def run_unequal(version: str, prefill: Sequence[str], decode: Sequence[str]) -> Iterator[Pair]:
    """Run a pair whose sides have these further options."""
    common = ("--sglang-version", version, "--dp-attention", *FAST)
    with (
        EngineProcess("prefill", 2, *common, *prefill) as one,
        EngineProcess("decode", 2, *common, *decode) as other,
        loopback.client() as client,
        ThreadPoolExecutor(4) as pool,
    ):
        yield Pair(one, other, client, pool)


@pytest.mark.parametrize(
    ("version", "prefill", "decode", "words"),
    [
        pytest.param(
            version,
            ("--page-size", "1"),
            ("--page-size", "2"),
            "Page size mismatch: prefill server has page_size=1, but decode server has page_size=2. "
            "Both servers must use the same --page-size value.",
            id=f"page size, {version}",
        )
        for version in ("0.5.8", "0.5.10", "0.5.23")
    ]
    + [
        pytest.param(
            version,
            ("--kv-cache-dtype", "auto"),
            ("--kv-cache-dtype", "bf16"),
            "KV cache dtype mismatch: prefill server has kv_cache_dtype=auto, but decode server has "
            "kv_cache_dtype=bf16. Both servers must use the same --kv-cache-dtype value.",
            id=f"cache type, {version}",
        )
        for version in ("0.5.10", "0.5.23")
    ],
)
def test_decode_engine_ends_itself(version: str, prefill: Sequence[str], decode: Sequence[str], words: str) -> None:
    """It does so at the first request, with SGLang's text; the prefill engine lives."""
    with run_unequal(version, prefill, decode) as pair:
        legs = [pair.post(engine, "/generate", **pair.meeting(4)) for engine in (pair.prefill, pair.decode)]
        with pytest.raises(httpx.TransportError):
            legs[1].result()
        wait_for(lambda: not pair.decode.is_running)

        assert pair.decode.stop() == -signal.SIGKILL
        assert f"killed by a request: RuntimeError: {words}" in pair.decode.log()
        assert legs[0].result().status_code == 500
        assert pair.prefill.is_running


@pytest.mark.parametrize(
    ("version", "option", "value"),
    [
        pytest.param("0.5.7", "--page-size", "2", id="page size before 0.5.8"),
        pytest.param("0.5.9", "--kv-cache-dtype", "bf16", id="cache type before 0.5.10"),
    ],
)
def test_older_releases_do_not_check(version: str, option: str, value: str) -> None:
    """They go on with a KV cache of the wrong shape; here the answer does not show it."""
    with run_unequal(version, (), (option, value)) as pair:
        prefill, decode = pair.send("/generate", pair.meeting(4))

        assert (prefill.status_code, decode.status_code) == (200, 200)


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        pytest.param("0.5.15", "0.5.23", (200, 200), id="decode is later"),
        pytest.param("0.5.23", "0.5.22", (500, 500), id="prefill is later"),
        pytest.param("0.5.9", "0.5.10", (500, 500), id="other names"),
        pytest.param("0.5.9", "0.5.7", (200, 200), id="prefill is later, before 0.5.10"),
        pytest.param("0.5.7", "0.5.9", (500, 500), id="prefill lacks a buffer"),
    ],
)
def test_releases_connect_only_if_decode_understands_prefill(
    prefill: str, decode: str, expected: tuple[int, int]
) -> None:
    """Both legs fail otherwise, and both engines live."""
    with run_unequal("0.5.23", ("--sglang-version", prefill), ("--sglang-version", decode)) as pair:
        answers = pair.send("/generate", pair.meeting(4))

        assert tuple(each.status_code for each in answers) == expected
        assert pair.prefill.is_running
        assert pair.decode.is_running


def test_other_transfer_backend_stops_a_prefill_rank() -> None:
    """Both legs time out, and so do later ones of a pair that would work: the thread that reads has ended."""
    with (
        run_unequal("0.5.23", (), ("--disaggregation-transfer-backend", "nixl")) as pair,
        EngineProcess("decode", 2, "--dp-attention", *FAST) as sound,
    ):
        first = pair.send("/generate", pair.meeting(4))
        second = [pair.post(engine, "/generate", **pair.meeting(6)) for engine in (pair.prefill, sound)]
        third = [pair.post(engine, "/generate", **pair.meeting(7)) for engine in (pair.prefill, sound)]

        assert "timed out" in text_of(first[0])
        assert "timed out" in text_of(first[1])
        assert "timed out" in text_of(second[0].result())
        assert [each.result().status_code for each in third] == [200, 200]


def test_pages_report_the_options() -> None:
    """They do so as SGLang's do."""
    reported = {"page_size": 64, "kv_cache_dtype": "fp8_e4m3", "disaggregation_transfer_backend": "nixl"}
    options = ("--page-size", "64", "--kv-cache-dtype", "fp8_e4m3", "--disaggregation-transfer-backend", "nixl")
    with EngineProcess("prefill", 2, *options) as engine:
        info = httpx.get(f"{engine.url}/server_info").json()
        query = dict.fromkeys(("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank"), -1)
        route = httpx.get(f"http://127.0.0.1:{engine.bootstrap_port}/route", params=query).json()

        assert {key: info[key] for key in reported} == reported
        assert (route["page_size"], route["kv_cache_dtype"]) == (64, "fp8_e4m3")
        assert "sglang:page_size" in httpx.get(f"{engine.url}/metrics").text
