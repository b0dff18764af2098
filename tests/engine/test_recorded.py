"""The engine's pages beside the recorded ones of SGLang 0.5.23: nothing on ours that is not on theirs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dp_extproc.testbed.engine import EngineProcess
from engine.pair import FAST, PROMPTS

RECORDED = Path(__file__).parent.parent / "fleet" / "recorded" / "pd_dpattn"


@pytest.fixture(scope="module", params=["prefill", "decode"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    """A server that has answered one request."""
    with EngineProcess(request.param, 2, *FAST, "--dp-attention", "--model", "tiny") as engine:
        body = {**PROMPTS["/generate"], "bootstrap_host": "2.2.2.2", "bootstrap_room": 5}
        assert httpx.post(f"{engine.url}/generate", json=body).status_code == 200
        yield engine


def recorded(engine: EngineProcess, page: str) -> str:
    return (RECORDED / f"{engine.role}_{page}").read_text()


def series(page: str) -> dict[str, set[frozenset[str]]]:
    """Label names by series."""
    found: dict[str, set[frozenset[str]]] = {}
    for line in page.splitlines():
        if match := re.match(r"[^#{ ]+", line):
            found.setdefault(match[0], set()).add(frozenset(re.findall(r'(\w+)="', line)))
    return found


def test_metrics(engine: EngineProcess) -> None:
    """Every series is a real one, with the labels that it really has; both roles export the same."""
    ours, theirs = (
        series(httpx.get(f"{engine.url}/metrics").text),
        series((RECORDED / "decode_metrics.txt").read_text()),
    )

    assert ours.keys() - theirs.keys() == set()
    assert {name: labels for name, labels in ours.items() if not labels <= theirs[name]} == {}


def test_loads(engine: EngineProcess) -> None:
    """The same keys in the same order, and the same numbers in the Prometheus form."""
    ours, theirs = httpx.get(f"{engine.url}/v1/loads").json(), json.loads(recorded(engine, "loads.json"))

    assert shape(ours) == shape(theirs)
    assert list(ours["loads"][0]) == list(theirs["loads"][0])


def test_server_info(engine: EngineProcess) -> None:
    """Every key is a real one, with a value of its type."""
    ours, theirs = httpx.get(f"{engine.url}/server_info").json(), json.loads(recorded(engine, "server_info.json"))

    assert ours.keys() - theirs.keys() == set()
    assert {key: type(ours[key]) for key in ours} == {key: type(theirs[key]) for key in ours}
    same = ("dp_size", "attn_dp_size", "disaggregation_mode", "load_balance_method", "served_model_name", "version")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def shape(value: Any) -> Any:
    """Keep keys and kinds."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return "number" if isinstance(value, int | float) else type(value).__name__
