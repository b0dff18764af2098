"""Under load, engines die and restart, the service dies, and clients disconnect."""

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import cycle, islice
from threading import Barrier, Event
from typing import Any

import anthropic
import httpx
import openai
import pytest

from dp_extproc.lab.testbed.engine import EngineProcess
from e2e.stack import PATIENCE
from faults.fleet import BODIES, Fleet, Outcome, ask, run_fleet
from patience import wait_for

CHAT, GENERATE = BODIES
INTERVAL = 1.0
"""Seconds between two reads of a load page, in tests where that matters."""
CLIENTS = 50
LONG: dict[str, dict[str, Any]] = {CHAT: {"max_tokens": 20}, GENERATE: {"sampling_params": {"max_new_tokens": 20}}}
"""Bodies of responses that take half a second on the slow engines below."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Give a fleet half as fast as a real one, with default supervision."""
    load = {"interval": f"{INTERVAL:.0f}s", "stale_after": "5s", "timeout": "1s"}
    with run_fleet(("--time-scale", "2", *PATIENCE), load=load) as fleet:
        yield fleet


@contextmanager
def clients(fleet: Fleet) -> Iterator[list[Outcome]]:
    """Run clients that send requests without pause, half of them for streams, and collect the results."""
    enough, outcomes = Event(), []

    def work(path: str, *, stream: bool) -> None:
        while not enough.is_set():
            outcomes.append(ask(fleet.client, path, stream=stream, patience=20, **LONG[path]))

    kinds = cycle([(CHAT, False), (CHAT, True), (GENERATE, False), (GENERATE, True)])
    working = [fleet.threads.submit(work, path, stream=stream) for path, stream in islice(kinds, CLIENTS)]
    try:
        wait_for(lambda: len(outcomes) > CLIENTS, 30)
        yield outcomes
    finally:
        enough.set()
        for each in working:
            each.result()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_has_traffic_again_after_it_restarts(fleet: Fleet, role: str) -> None:
    """No request without a token is lost, and the engine has traffic again within two load intervals."""
    victim = (fleet.prefills if role == "prefill" else fleet.decodes)[0]
    with clients(fleet) as outcomes:
        victim.stop(signal.SIGKILL)
        count = len(outcomes)
        wait_for(lambda: len(outcomes) > count + CLIENTS, 30)
        victim.start()
        victim.wait_until_listening()
        wait_for(victim.requests, 2 * INTERVAL)
        count = len(outcomes)
        wait_for(lambda: len(outcomes) > count + CLIENTS, 30)

    assert [str(outcome) for outcome in outcomes if outcome.is_lost] == []
    kinds = Counter(map(str, outcomes))
    cut = [outcome for outcome in outcomes if not outcome.complete]
    assert len(cut) <= (0 if role == "prefill" else CLIENTS), kinds
    assert [
        str(outcome) for outcome in cut if outcome.text.startswith("data:") and not outcome.is_marked_incomplete
    ] == []
    fleet.settle()


def test_many_streams_continue_when_the_service_dies(fleet: Fleet) -> None:
    """All begun streams complete; then requests get a 503, and are served once the service has restarted."""
    streams = 200
    for engine in fleet.decodes:
        engine.fault(inference={"kind": "slow", "after": 2, "seconds": 5})

    def kill() -> None:
        fleet.service.stop(signal.SIGKILL)
        for engine in fleet.decodes:
            engine.heal()

    all_have_begun = Barrier(streams, kill)
    asked: Sequence[Future[Outcome]] = [
        fleet.threads.submit(ask, fleet.client, CHAT, stream=True, patience=60, on_first=all_have_begun.wait)
        for _ in range(streams)
    ]
    outcomes = Counter(str(each.result()) for each in asked)
    while_down = ask(fleet.client, GENERATE, stream=False)
    fleet.service.start()
    fleet.service.wait_until_listening()
    fleet.service.wait_until_ready()

    wait_for(lambda: ask(fleet.client, GENERATE, stream=False).complete, 1.0)
    assert outcomes == {"answer": streams}
    assert str(while_down) == "503 service_unavailable"
    fleet.wait_until_fresh()
    fleet.settle()


@pytest.mark.parametrize("path", BODIES)
def test_a_disconnect_reaches_the_engine_in_a_stream_without_output(fleet: Fleet, path: str) -> None:
    """The decode engine notices the disconnect within a second, although it sends nothing for eight."""
    fleet.forget()
    for engine in fleet.decodes:
        engine.fault(inference={"kind": "slow", "after": 2, "seconds": 8})
    with fleet.client.stream("POST", path, json={**BODIES[path], "stream": True}) as answer:
        next(answer.iter_bytes())

    wait_for(lambda: _left(fleet.decodes), 1.0)
    fleet.recover()
    fleet.settle()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_disconnect_reaches_both_engines_before_the_first_token(fleet: Fleet, *, stream: bool) -> None:
    """Both engines notice the disconnect within a second."""
    fleet.forget()
    for engine in fleet.engines:
        engine.fault(inference="hang")
    with pytest.raises(httpx.ReadTimeout):
        fleet.client.post(GENERATE, json={**BODIES[GENERATE], "stream": stream}, timeout=0.2)

    wait_for(lambda: _left(fleet.prefills) and _left(fleet.decodes), 1.0)
    fleet.recover()
    fleet.settle()


def test_streams_arrive_whole_if_many_start_at_once(fleet: Fleet) -> None:
    """Nothing is lost, in whatever order the beginning of a stream, its end and their reports arrive."""
    asked = [fleet.threads.submit(ask, fleet.client, CHAT, stream=True, patience=60) for _ in range(200)]

    assert Counter(str(each.result()) for each in asked) == {"answer": 200}


def test_client_libraries_raise_the_error_of_a_truncated_stream(fleet: Fleet) -> None:
    """Both clients raise the event as an error, after the part of the response that arrived."""
    url = str(fleet.client.base_url)
    for engine in fleet.decodes:
        engine.fault(inference={"kind": "close", "after": 4, "seconds": 0.2})

    heard: list[object] = []
    asked: Any = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "stream": True}
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as chats,
        pytest.raises(openai.APIError, match="the answer is not complete") as leaked,
    ):
        heard.extend(chats.chat.completions.create(**asked))
    with (
        anthropic.Anthropic(base_url=url, api_key="key", max_retries=0) as messages,
        pytest.raises(anthropic.APIStatusError, match="the answer is not complete"),
    ):
        heard.extend(messages.messages.create(**asked))

    assert leaked.value.code == "stream_cut"
    assert len(heard) >= 4
    fleet.recover()
    fleet.settle()


def _left(engines: Sequence[EngineProcess]) -> bool:
    return any(record["disconnected_at"] for engine in engines for record in engine.requests())
