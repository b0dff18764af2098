"""Requests that end a whole engine in SGLang end the stand-in, too."""

import signal
from typing import Any

import httpx
import pytest

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from lab.engine.pair import PROMPTS
from patience import wait_for

ROOM = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1, "bootstrap_room": 5}
ALONE = {**ROOM, "bootstrap_host": "2.2.2.2"}
"""SGLang's fake transfer: prefill computes without a decode side."""
IDS = {"text": None, "input_ids": [1, -1]}


@pytest.mark.parametrize(
    ("role", "version", "path", "body"),
    [
        pytest.param("prefill", "0.5.23", "/generate", {}, id="prefill without a room"),
        pytest.param("prefill", "0.5.23", "/v1/score", ROOM, id="a path that drops the room"),
        pytest.param("prefill", "0.5.21", "/v1/messages", {**ROOM, "routed_dp_rank": 1}, id="messages before 0.5.22"),
        pytest.param("prefill", "0.5.18", "/v1/responses", {**ROOM, "routed_dp_rank": 1}, id="responses before 0.5.20"),
        pytest.param("decode", "0.5.5", "/generate", {}, id="old decode without a room"),
        pytest.param("decode", "0.5.9", "/generate", {**ROOM, "data_parallel_rank": 2}, id="old rank out of range"),
        pytest.param("unified", "0.5.9", "/generate", {"data_parallel_rank": 2}, id="the same on a unified server"),
        pytest.param("decode", "0.5.23", "/generate", {"bootstrap_room": 5}, id="decode without a bootstrap host"),
        pytest.param(
            "decode", "0.5.23", "/v1/completions", {**ROOM, "bootstrap_room": [5]}, id="a list for one prompt"
        ),
        pytest.param("prefill", "0.5.23", "/generate", {**ALONE, **IDS}, id="a token id below zero"),
        pytest.param("unified", "0.5.9", "/generate", IDS, id="the same on an old release"),
        pytest.param("unified", "0.5.23", "/v1/completions", {"prompt": [[1], [2, -1]]}, id="the same in a batch"),
        pytest.param("unified", "0.5.23", "/v1/completions", {"prompt": [2**31]}, id="a token id beyond all"),
        pytest.param("unified", "0.5.13", "/v1/chat/completions", {"input_ids": [-1]}, id="the same in a chat"),
    ],
)
def test_request_kills_the_engine(role: str, version: str, path: str, body: dict[str, Any]) -> None:
    """No answer comes, and the process is gone."""
    with EngineProcess(role, 2, "--sglang-version", version, "--dp-attention") as engine:
        with pytest.raises(httpx.TransportError):
            httpx.post(engine.url + path, json={**PROMPTS.get(path, {}), **body})
        wait_for(lambda: not engine.is_running)

        assert engine.stop() == -signal.SIGKILL
        assert "killed by a request" in engine.log()


@pytest.mark.parametrize(
    ("role", "path", "body", "options"),
    [
        pytest.param("decode", "/generate", {**ALONE, **IDS}, (), id="decode computes no prompt"),
        pytest.param("unified", "/generate", IDS, ("--attn-tp-size", "2"), id="a sharded embedding masks it"),
        pytest.param(
            "unified",
            "/v1/chat/completions",
            {"input_ids": [-1]},
            ("--sglang-version", "0.5.12"),
            id="a chat before 0.5.13 takes no ids",
        ),
    ],
)
def test_token_id_below_zero_passes_with_a_sharded_embedding(
    role: str, path: str, body: dict[str, Any], options: tuple[str, ...]
) -> None:
    """Only the lookup of an embedding in one piece fails."""
    with EngineProcess(role, 2, "--dp-attention", "--time-scale", "0.01", *options) as engine:
        assert httpx.post(engine.url + path, json={**PROMPTS[path], **body}).status_code == 200
        assert engine.is_running


@pytest.mark.parametrize(
    ("role", "ranks", "body"),
    [
        pytest.param("prefill", 2, {"routed_dp_rank": 1}, id="prefill with a rank"),
        pytest.param("prefill", 1, {}, id="prefill with one rank"),
        pytest.param("decode", 2, {}, id="decode"),
    ],
)
def test_missing_room_is_a_bad_request_behind_the_controller(role: str, ranks: int, body: dict[str, Any]) -> None:
    """Past the controller it is a clean 400."""
    with EngineProcess(role, ranks, "--dp-attention") as engine:
        answer = httpx.post(f"{engine.url}/generate", json={**PROMPTS["/generate"], **body, "rid": "mine"})

        assert answer.status_code == 400
        assert answer.json() == {
            "error": {
                "message": "Invalid request: Disaggregated request received without bootstrap room id. req.rid='mine'"
            }
        }
        assert engine.is_running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_engine_stops_at_once_with_open_requests(number: signal.Signals) -> None:
    """A signal ends it with status 0."""
    with EngineProcess("decode", 2) as engine, loopback.client() as client:
        body = {**PROMPTS["/generate"], **ROOM, "stream": True}
        with client.stream("POST", f"{engine.url}/generate", json=body) as response:
            assert response.status_code == 200

            assert engine.stop(number) == 0
        assert "Traceback" not in engine.log()


def test_engine_with_drain_serves_until_its_last_request_has_ended() -> None:
    """Like SGLang it is not ready from SIGTERM on, and takes further requests."""
    with EngineProcess("unified", 1, "--drain", "0.2") as engine, loopback.client() as client:
        body = {"text": "x", "sampling_params": {"max_new_tokens": 60}}
        with client.stream("POST", f"{engine.url}/generate", json=body | {"stream": True}) as response:
            assert response.status_code == 200
            assert client.get(f"{engine.url}/ready").status_code == 200
            engine.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get(f"{engine.url}/ready").status_code == 503)
            assert client.get(f"{engine.url}/health").status_code == 503
            body["sampling_params"] = {"max_new_tokens": 1}
            assert client.post(f"{engine.url}/generate", json=body).status_code == 200
            assert "[DONE]" in response.read().decode()
        wait_for(lambda: not engine.is_running)
        assert engine.stop() == 0
        assert "Traceback" not in engine.log()


def test_second_signal_ends_an_engine_that_drains() -> None:
    """An operator who does not want to wait repeats the signal."""
    with EngineProcess("unified", 1, "--drain", "600") as engine:
        engine.send_signal(signal.SIGTERM)
        wait_for(lambda: loopback.CLIENT.get(f"{engine.url}/ready").status_code == 503)
        assert engine.stop() == 0
