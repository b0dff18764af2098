"""``dp-extproc check`` explains each strict engine on one screen, and rejects those that cannot serve."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.hosted import HostedEngine, HostedEngines

LINES, COLUMNS = 24, 100
"""Lines and columns of a screen."""
UNSEEN = {"affinity": {"prefixes": False}}
OVERRIDES = ("--header-overrides",)

ENGINES = {
    "prefill": ("--role", "prefill", "--dp-size", "4", "--dp-attention"),
    "decode": ("--role", "decode", "--dp-size", "2", "--dp-attention"),
    "worst prefill": ("--role", "prefill", "--dp-size", "4", "--no-dp-attention", "--sglang-version", "0.5.11"),
    "worst decode": ("--role", "decode", "--dp-size", "4", "--sglang-version", "0.5.11"),
    "worker": ("--dp-size", "4"),
    "vllm": ("--kind", "vllm", "--vllm-version", "0.11.0", "--dp-size", "4"),
    "old vllm": ("--kind", "vllm", "--vllm-version", "0.10.0", "--dp-size", "4"),
    "obedient prefill": ("--role", "prefill", "--dp-size", "4", *OVERRIDES),
    "obedient decode": ("--role", "decode", "--dp-size", "4", *OVERRIDES),
    "0.5.17 prefill": ("--role", "prefill", "--dp-size", "4", "--sglang-version", "0.5.17", *OVERRIDES),
    "0.5.11 prefill": ("--role", "prefill", "--dp-size", "4", "--sglang-version", "0.5.11", *OVERRIDES),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shop:
    """Engines to choose from, and the command."""

    engines: dict[str, HostedEngine]
    config: Path

    def check(self, pool: dict[str, Any], body_mode: str = "buffered") -> tuple[int, str]:
        """Run the command on one pool.

        Returns:
            Its exit status and what it printed.
        """
        content = {"envoy": {"body_mode": body_mode}, "pools": [{"models": ["m"], **pool}]}
        self.config.write_text(yaml.safe_dump(content), encoding="utf-8")
        command = [sys.executable, "-m", "dp_extproc", "check", "-c", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stderr == ""
        return done.returncode, done.stdout

    def pair(self, prefill: str, decode: str) -> dict[str, Any]:
        """Make a pool of a prefill and a decode engine."""
        return {
            "prefill": {"endpoints": [self.engines[prefill].url]},
            "decode": {"endpoints": [self.engines[decode].url]},
        }


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    hosted = HostedEngines()
    engines = {name: hosted.add(*options) for name, options in ENGINES.items()}
    with hosted:
        yield Shop(engines, tmp_path_factory.mktemp("check") / "config.yaml")


def explained(out: str, url: str) -> list[str]:
    """List all rows of a terminal about an engine: heading, its line, its rank control, and its diagnostics."""
    head, *lines = out.splitlines()
    found, concerns = [head], False
    for line in lines:
        concerns = url in line or (concerns and line.startswith("  "))
        if concerns:
            found.append(line)
    return [line[at : at + COLUMNS] for line in found for at in range(0, len(line), COLUMNS)]


def rank_control_of(out: str, url: str) -> str:
    """Return the sentence about the rank control of an engine."""
    return next(
        line for line in out.splitlines() if line.startswith("http") and url in line.partition(": ")[0].split(", ")
    )


def codes_of(out: str, url: str) -> set[str]:
    """List the diagnostic codes of an engine."""
    return {line.partition(":")[0] for line in out.splitlines() if line.endswith(url) or f"{url}, " in line}


@pytest.mark.parametrize(
    ("prefill", "decode", "ways", "codes"),
    [
        pytest.param(
            "prefill",
            "decode",
            ("rank by routed_dp_rank in the body, and a room that agrees", "/v1/messages"),
            {"roomless_is_fatal"},
            id="at its best",
        ),
        pytest.param(
            "worst prefill",
            "worst decode",
            ("rank 0 only", "/generate"),
            {"plain_dp_first_rank_only", "roomless_is_fatal", "paths_refused"},
            id="at its worst",
        ),
    ],
)
def test_check_explains_a_pair_on_one_screen(
    shop: Shop, prefill: str, decode: str, ways: tuple[str, ...], codes: set[str]
) -> None:
    """One screen has release, ranks, load page, rank control, and every diagnostic with its remedy."""
    status, out = shop.check(shop.pair(prefill, decode))
    first, second = shop.engines[prefill].url, shop.engines[decode].url
    row = next(line.split() for line in out.splitlines() if line.startswith(f"{first} "))
    screen = explained(out, first)

    assert status == 0, out
    assert (row[1], row[4], row[6]) == ("prefill", "4", "/v1/loads")
    assert all(words in rank_control_of(out, first) for words in ways)
    assert codes_of(out, first) == codes
    assert "".join(screen).count("remedy: ") == "".join(screen).count("what happens: ") == len(codes)
    assert len(screen) <= LINES
    assert len(explained(out, second)) <= LINES


@pytest.mark.parametrize(
    ("name", "release", "way", "page"),
    [
        ("worker", "0.5.23", "rank by routed_dp_rank", "/v1/loads"),
        ("vllm", "vLLM-0.11.0", "the header x-data-parallel-rank", "/metrics"),
    ],
)
def test_check_explains_aggregated_engines_on_one_screen(
    shop: Shop, name: str, release: str, way: str, page: str
) -> None:
    """One screen has aggregated engines of both kinds."""
    url = shop.engines[name].url
    status, out = shop.check({"workers": {"endpoints": [url]}})

    assert status == 0, out
    assert {release, "4", page} <= set(next(line.split() for line in out.splitlines() if line.startswith(url)))
    assert way in rank_control_of(out, url)
    assert len(explained(out, url)) <= LINES


def test_check_accepts_an_old_vllm_with_a_remedy(shop: Shop) -> None:
    """An old vLLM serves and picks its ranks itself, and the remedy is printed."""
    url = shop.engines["old vllm"].url
    status, out = shop.check({"workers": {"endpoints": [url]}})

    assert status == 0
    assert "rank by the engine itself" in rank_control_of(out, url)
    assert codes_of(out, url) == {"rank_not_carried"}
    assert "upgrade to vLLM 0.11.0" in out


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_check_rejects_vllm_in_a_disaggregated_pool(shop: Shop, role: str) -> None:
    """The rejection has the reason and the correct configuration."""
    url = shop.engines["vllm"].url
    status, out = shop.check({**shop.pair("prefill", "decode"), role: {"endpoints": [url]}})

    assert status == 1
    assert "vllm_disaggregated" in codes_of(out, url)
    assert "KV connectors run prefill before decode" in out
    assert "remedy: list it under workers" in out
    assert len(explained(out, url)) <= LINES


ON_ALL = "/generate, /v1/chat/completions, /v1/messages"


@pytest.mark.parametrize(
    ("prefill", "body_mode", "status", "codes", "way"),
    [
        ("obedient prefill", "buffered", 0, set(), f"x-override-* headers where nothing is streamed ({ON_ALL})"),
        ("obedient prefill", "none", 0, {"paths_without_bodies"}, f"headers alone; paths: {ON_ALL}"),
        ("0.5.17 prefill", "buffered", 0, {"overrides_not_on_chat"}, "where nothing is streamed (/generate)"),
        ("0.5.17 prefill", "none", 1, {"overrides_not_on_chat", "paths_without_bodies"}, "paths: /generate"),
        ("prefill", "buffered", 1, {"overrides_not_read"}, "routed_dp_rank in the body"),
        ("prefill", "none", 1, {"overrides_not_read"}, "paths: none"),
        ("0.5.11 prefill", "buffered", 1, {"overrides_not_read"}, "rank 0 only"),
        ("0.5.11 prefill", "none", 1, {"overrides_not_read"}, "paths: none"),
    ],
)
def test_check_rejects_an_engine_that_ignores_override_headers(  # noqa: PLR0917 - a table
    shop: Shop, prefill: str, body_mode: str, status: int, codes: set[str], way: str
) -> None:
    """An engine that reads no override headers is rejected; one that reads them on fewer paths only without bodies."""
    url = shop.engines[prefill].url
    pool = {**shop.pair(prefill, "obedient decode"), "routing_fields": "headers", "policy": UNSEEN}
    found, out = shop.check(pool, body_mode)

    assert found == status, out
    assert way in rank_control_of(out, url)
    assert {code for code in codes_of(out, url) if code.startswith(("overrides", "paths_without"))} == codes
    assert len(explained(out, url)) <= LINES


def test_check_prints_what_each_source_reports(shop: Shop, tmp_path: Path) -> None:
    """A source that fails makes the command fail, and the engines of the others are checked."""
    listed = tmp_path / "decode.yaml"
    listed.write_text(yaml.safe_dump([shop.engines["decode"].url]), encoding="utf-8")
    sources = {
        "prefill": {"endpoints": [shop.engines["prefill"].url], "file": {"path": str(tmp_path / "missing.yaml")}},
        "decode": {"file": {"path": str(listed)}},
    }
    status, text = shop.check(sources)

    assert status == 1
    assert f"file {tmp_path}/missing.yaml (pool m, prefill): fails: cannot be read: No such file or directory" in text
    assert f"file {listed} (pool m, decode): 1 ready" in text
    assert "2 engines can be used" in text
