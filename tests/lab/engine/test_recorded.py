"""Compare the stand-in's pages with the recorded ones of SGLang 0.5.23."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import FAST, PROMPTS

PAGES = Path(__file__).parents[2] / "engines" / "recorded" / "pd_dpattn"
METRICS: dict[str, Any] = json.loads((Path(__file__).parent / "recorded" / "metrics.json").read_text())
ATTENTION = {"dpattn", "attention prefill", "attention decode"}
MAY_NOT_HAVE_BEGUN = {"num_aborted_requests_total", "cached_tokens_total"}
"""Series without a cause here: no request is aborted, and prefill reports no cached tokens to decode."""
DEPENDS_ON_TRAFFIC = {"is_streaming", "mode"}


@pytest.fixture(scope="module", params=list(METRICS["pages"]))
def page(request: pytest.FixtureRequest) -> str:
    """Name the recorded engine that the stand-in is compared with."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def engine(page: str) -> Iterator[EngineProcess]:
    """Run an engine that has answered what the recorded one had, streaming or not."""
    role = page.rsplit(maxsplit=1)[-1] if " " in page else "unified"
    options = ["--dp-attention"] if page in ATTENTION else []
    streams = any(each.get("is_streaming") == "true" for labels in theirs(page).values() for each in labels)
    with EngineProcess(role, 2, *FAST, *options, "--model", "tiny") as engine, loopback.client() as client:
        for rank in (0, 1):
            for stream in (False, streams):
                ranks = {"routed_dp_rank": rank, "disagg_prefill_dp_rank": rank}
                fake = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 2 + rank}
                body = {**PROMPTS["/generate"], **fake, **ranks, "text": "the same words", "stream": stream}
                assert client.post(f"{engine.url}/generate", json=body).status_code == 200
        yield engine


def theirs(page: str) -> dict[str, list[dict[str, str]]]:
    """Return the labels of the recorded series; a histogram is there by its count."""
    recorded: dict[str, list[str]] = METRICS["pages"][page]
    return {name: METRICS["labels"][int(number)] for number, names in recorded.items() for name in names}


def ours(engine: EngineProcess) -> dict[str, list[dict[str, str]]]:
    """Return the labels of the stand-in's series; a histogram is there by its count."""
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels in re.findall(r"^sglang:(\w+)\{(.*)\}", httpx.get(f"{engine.url}/metrics").text, re.MULTILINE):
        if not name.endswith(("_bucket", "_sum")):
            read = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            found.setdefault(name, []).append(read | ({"pid": "..."} if "pid" in read else {}))
    return found


def test_metrics(engine: EngineProcess, page: str) -> None:
    """The same series with the same labels, but for those that are left out; only traffic makes a difference."""
    real, mine = theirs(page), ours(engine)

    assert real.keys() - MAY_NOT_HAVE_BEGUN <= mine.keys() <= real.keys()
    assert not mine.keys() & set(METRICS["left_out"])
    for name, labels in mine.items():
        assert [each for each in real[name] if each not in labels] == [], name
        if not DEPENDS_ON_TRAFFIC & labels[0].keys():
            assert [each for each in labels if each not in real[name]] == [], name
        assert {frozenset(each) for each in labels} == {frozenset(each) for each in real[name]}, name


def test_histograms_have_sglangs_buckets(engine: EngineProcess) -> None:
    """Histograms have SGLang's buckets."""
    found: dict[str, list[str]] = {}
    text = httpx.get(f"{engine.url}/metrics").text
    for name, bound in re.findall(r'^sglang:(\w+)_bucket\{.*?le="([^"]*)"', text, re.MULTILINE):
        if bound not in found.setdefault(name, []):
            found[name].append(bound)

    assert found
    assert found == {name: METRICS["buckets"][name] for name in found}


def test_loads_for_prometheus(engine: EngineProcess) -> None:
    """The same gauges in the same order, each for both ranks; decode's moments are no number, so they are not here."""
    text = httpx.get(f"{engine.url}/v1/loads?format=prometheus").text

    assert re.findall(r"^# TYPE (\w+) gauge", text, re.MULTILINE) == METRICS["loads"]
    assert re.findall(r'^(\w+)\{dp_rank="1"\} ', text, re.MULTILINE) == METRICS["loads"]


@pytest.mark.parametrize("page", ["attention prefill", "attention decode"], indirect=True)
def test_loads_are_as_recorded(engine: EngineProcess) -> None:
    """They have the same keys in the same order and the same types; an unknown utilization differs by role."""
    mine, real = httpx.get(f"{engine.url}/v1/loads").json(), json.loads(recorded(engine, "loads.json"))

    assert shape(mine) == shape(real)
    assert list(mine["loads"][0]) == list(real["loads"][0])
    assert mine["loads"][0]["utilization"] == real["loads"][0]["utilization"]


@pytest.mark.parametrize("page", ["attention prefill", "attention decode"], indirect=True)
def test_server_info_is_as_recorded(engine: EngineProcess) -> None:
    """Every key is a real one, with a value of its type."""
    mine, real = httpx.get(f"{engine.url}/server_info").json(), json.loads(recorded(engine, "server_info.json"))

    assert mine.keys() - real.keys() == set()
    assert {key: type(mine[key]) for key in mine} == {key: type(real[key]) for key in mine}
    same = ("dp_size", "attn_dp_size", "disaggregation_mode", "load_balance_method", "served_model_name", "version")
    assert {key: mine[key] for key in same} == {key: real[key] for key in same}


def recorded(engine: EngineProcess, page: str) -> str:
    return (PAGES / f"{engine.role}_{page}").read_text()


def shape(value: Any) -> Any:
    """Keep keys and types."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return "number" if isinstance(value, int | float) else type(value).__name__
