"""The state machine of attempts against the two machines that it replaces: the same scripts, the same outcome."""

import asyncio
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dp_extproc import contract
from dp_extproc.config.reliability import Supervise, SupervisionSettings
from dp_extproc.extproc.new_service import ExtProcService as NewService
from dp_extproc.extproc.service import ExtProcService as OldService
from extproc.wire import NewWatcher, Watcher
from fuzz.effort import examples
from fuzz.streams import SCRIPTS, End, Say, Stage, Wait
from fuzz.virtual_time import run

LEG_ORDER = ["request_headers", "response_headers", "response_body"]


class Orderly:
    """Drops what no Envoy sends on the streams of legs and first events; both machines are free to differ there."""

    def __init__(self, stage: Stage, mode: Supervise) -> None:
        self.stage = stage
        self.mode = mode
        self._phases: dict[tuple[str, str], int] = {}
        """How far the leg of a main stream is."""

    def filter(self, step: Say | End | Wait) -> Say | End | Wait | None:
        if isinstance(step, Wait) or step.stream == "foreign leg":
            return step
        if step.stream == "main":
            main = self.stage._current.get((step.request, "main"))
            answers = main.context.answers() if main is not None and not main.task.done() else []
            is_answered = any(answer.WhichOneof("response") == "immediate_response" for answer in answers)
            return None if is_answered and isinstance(step, Say) else step
        headers = self._headers(step.request)
        token = headers.get(contract.LEG)
        if token is None or (step.stream == "first event" and contract.WATCH not in headers):
            return None
        key = (token, step.stream)
        if isinstance(step, End):
            self._phases[key] = len(LEG_ORDER) + 1
            return step
        if step.stream == "first event":
            return Say(step.request, step.stream, self._bodies(step, key)) if self.mode is Supervise.ANSWERS else None
        kept = []
        for message in step.messages:
            kind = message.WhichOneof("request")
            at = self._phases.get(key, 1 if self.mode is Supervise.OFF else 0)
            if kind in LEG_ORDER and (at == LEG_ORDER.index(kind) or (at == 3 and kind == "response_body")):
                is_last = kind != "request_headers" and getattr(message, kind).end_of_stream
                self._phases[key] = len(LEG_ORDER) + 1 if is_last else min(at + 1, 3) if kind != "response_body" else 2
                kept.append(message)
        return Say(step.request, step.stream, kept) if kept else None

    def _bodies(self, step: Say, key: tuple[str, str]) -> list[Any]:
        kept = []
        for message in step.messages:
            if message.WhichOneof("request") == "response_body" and self._phases.get(key, 0) == 0:
                self._phases[key] = int(message.response_body.end_of_stream)
                kept.append(message)
        return kept

    def _headers(self, request: int) -> dict[str, str]:
        main = self.stage._current.get((request, "main"))
        found = {}
        for answer in main.context.answers() if main is not None else ():
            for phase in ("request_headers", "request_body"):
                for option in getattr(answer, phase).response.header_mutation.set_headers:
                    found[option.header.key] = option.header.raw_value.decode("latin-1")
        return found


def _state(stage: Stage, watcher: Any) -> dict[str, Any]:
    hosts = stage.fleet.load.hosts.values()
    return {
        "answers": [[str(answer) for answer in stream.context.answers()] for stream in stage.streams],
        "tokens": [[rank.own_tokens for rank in host.ranks] for host in hosts],
        "health": [(host.health.answers, host.health._failures, host.health.ejections) for host in hosts],
        "decisions": list(watcher.decisions),
        "failures": list(watcher.failures),
        "missing": watcher.unseen,
        "elsewhere": watcher.elsewhere,
        "queue": len(stage.queue),
    }


async def _play(script: list[Say | End | Wait], mode: Supervise, *, new: bool, limits: dict[str, int]) -> list[Any]:
    watcher: Any = NewWatcher() if new else Watcher()
    service: Any = NewService if new else OldService

    def make(decider: Any, **more: Any) -> Any:
        return service(decider, (watcher,) if new else watcher, **more)

    stage = Stage.build(SupervisionSettings(mode=mode), make, **limits)
    sweeper = asyncio.ensure_future(stage.service.sweep())
    states = []
    orderly = Orderly(stage, mode)
    for step in script:
        orderly_step = orderly.filter(step)
        if orderly_step is not None:
            await stage.play(orderly_step)
        assert not sweeper.done(), sweeper.exception()
        states.append(_state(stage, watcher))
    await stage.finish()
    states.append(_state(stage, watcher))
    sweeper.cancel()
    return states


@settings(phases=[Phase.explicit, Phase.generate])  # to shrink a script takes minutes
@examples(100)
@given(SCRIPTS, st.sampled_from(Supervise), st.sampled_from([{}, {"max_requests": 1}]))
def test_both_machines_agree(script: list[Say | End | Wait], mode: Supervise, limits: dict[str, int]) -> None:
    """Replies, reservations, health and reports are the same after each step."""
    old = run(_play(script, mode, new=False, limits=limits))
    new = run(_play(script, mode, new=True, limits=limits))
    for step, before, after in zip([*script, "the end"], old, new, strict=True):
        for what in before:
            assert before[what] == after[what], (step, what)
