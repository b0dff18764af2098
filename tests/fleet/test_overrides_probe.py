"""The probe whether an engine obeys ``x-override-*`` headers: yes, no, or open."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dp_extproc.config import LoadSettings
from dp_extproc.engines.adapter import read_facts
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Role
from dp_extproc.fleet.sources.http import EngineClient, make_client
from dp_extproc.fleet.sources.polling import FACTS_EVERY, OVERRIDES_EVERY, EnginePoller
from dp_extproc.load.cache import LoadCache
from fleet.scripted_engine import Answer, ScriptedEngine, cut_off, hang, not_http, refuse, reset
from fleet_fixtures import Clock

OBEYS = refuse(b'{"error":{"message":"invalid x-override-routed-dp-rank header \'probe\': invalid literal"}}')
OBEYS_NOT = refuse(b'{"error":{"message":"routed_dp_rank=1000000 out of range [0, 4)"}}')
SETTINGS = LoadSettings.model_validate({"timeout": "1s"})
INFO = {"version": "0.5.23", "dp_size": 4, "disaggregation_mode": "decode", "enable_dp_attention": True}
LOADS = {"loads": [{"dp_rank": rank, "num_used_tokens": 0} for rank in range(4)]}

UNKNOWN: dict[str, Answer] = {
    "another refusal": refuse(b"something else"),
    "no path": 404,
    "the wrong key": 401,
    "too busy": 503,
    "an error": 500,
    "no answer": hang,
    "a cut connection": reset,
    "half an answer": cut_off,
    "another protocol": not_http,
}


class Recorder:
    """A listener that keeps facts and failures."""

    def __init__(self) -> None:
        self.facts: list[EngineFacts] = []
        self.failures: list[EngineFailure] = []

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        self.facts.append(facts)

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:
        """Keep nothing."""

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:
        self.failures.append(failure)


async def probe(
    answers: Sequence[Answer | None], version: str = "0.5.23", pause: float = FACTS_EVERY
) -> tuple[list[bool | None], list[FailureKind]]:
    """Poll an engine that gives these answers to the probe, in turn; None is an engine that is away for a round.

    Returns:
        The finding of each discovery, and the kinds of all failures.
    """
    async with ScriptedEngine() as engine, make_client() as client:
        endpoint = Endpoint(engine.url, engine.host, engine.port, "m", Role.DECODE, needs_overrides=True)
        events, clock = Recorder(), Clock()
        poller = EnginePoller(EngineClient(endpoint, SETTINGS, client), SETTINGS.source, events, clock)
        for answer in answers:
            if answer is None:
                await engine.stop()
            else:
                engine.pages = {
                    "/server_info": json.dumps({**INFO, "version": version}).encode(),
                    "/v1/loads": json.dumps(LOADS).encode(),
                    "/generate": answer,
                }
            await poller.round()
            if answer is None:
                await engine.start()
            clock.now += pause
        return [facts.reads_overrides for facts in events.facts], [failure.kind for failure in events.failures]


@pytest.mark.parametrize(
    ("answer", "version", "found"),
    [
        pytest.param(OBEYS, "0.5.23", True, id="the header is refused"),
        pytest.param(OBEYS_NOT, "0.5.23", False, id="the body is refused"),
        pytest.param(b"{}", "0.5.23", False, id="nothing is refused"),
        pytest.param(hang, "0.5.14", False, id="a release that cannot"),
    ],
)
def test_probe_is_answered_by_the_error(answer: Answer, version: str, found: bool) -> None:
    """The error names one of the two mistakes of the probe."""
    assert asyncio.run(probe([answer], version)) == ([found], [])


@pytest.mark.parametrize("answer", UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("before", [OBEYS, OBEYS_NOT], ids=["did obey", "did not obey"])
def test_probe_that_is_left_open_changes_nothing(answer: Answer, before: Answer) -> None:
    """The facts count nevertheless; before the first answer the finding is open."""
    known = before is OBEYS

    assert asyncio.run(probe([answer, before, answer, answer])) == ([None, known, known, known], [])


def test_probe_is_repeated_soon_while_it_is_open() -> None:
    """After an answer it is repeated once a minute."""
    found, _ = asyncio.run(probe([503, 503, OBEYS, OBEYS, OBEYS], pause=OVERRIDES_EVERY))

    assert found == [None, None, True]


def test_finding_is_dropped_after_the_engine_was_gone() -> None:
    """It may have been started otherwise, and a header that it ignores leaves requests without a room."""
    found, failures = asyncio.run(probe([OBEYS, None, 503, OBEYS_NOT]))

    assert found == [True, None, False]
    assert set(failures) == {FailureKind.REFUSED}


def test_reservations_stay_when_the_finding_changes() -> None:
    """It is the same engine."""
    endpoint = Endpoint("http://a:1", "a", 1, "m", Role.DECODE, needs_overrides=True)
    facts = asyncio.run(_facts())
    fleet = LoadCache([endpoint], 5.0)
    for reads in (None, True, None, False, True):
        fleet.discovered(endpoint, "10.0.0.1:1", replace(facts, reads_overrides=reads), 1.0)
        host = fleet.by_url[endpoint.url]
        host.ranks[2].picks += 1
        assert bool(host.capabilities.overrides_on) is (reads is True)
        assert host.facts.reads_overrides is reads

    assert fleet.by_url[endpoint.url].ranks[2].picks == 5
    fleet.discovered(endpoint, "10.0.0.1:1", replace(facts, dp_ranks=8, reads_overrides=True), 2.0)
    assert fleet.by_url[endpoint.url].ranks[2].picks == 0


async def _facts() -> EngineFacts:
    async with ScriptedEngine({"/server_info": json.dumps(INFO).encode()}) as engine, make_client() as client:
        endpoint = Endpoint(engine.url, engine.host, engine.port, "m", Role.DECODE)
        engine_client = EngineClient(endpoint, SETTINGS, client)
        await engine_client.resolve()
        return await read_facts(engine_client, endpoint)
