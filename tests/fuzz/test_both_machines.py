"""The state machine of attempts against the two machines that it replaces: the same scripts, the same outcome."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dp_extproc import contract
from dp_extproc.config.reliability import Supervise, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.extproc.exchange import Exchange
from dp_extproc.extproc.old_service import ExtProcService as OldService
from dp_extproc.extproc.service import ExtProcService as NewService
from dp_extproc.request.rejection import Reason
from extproc.wire import Watcher
from fuzz.streams import SCRIPTS, End, Say, Stage, Wait
from fuzz.virtual_time import run


@dataclass
class OldWatcher:
    """Counts what the old machines tell."""

    decisions: list[str] = field(default_factory=list)
    failures: list[tuple[Role, Reason, bool]] = field(default_factory=list)
    unseen: int = 0
    elsewhere: int = 0

    def stream_opened(self) -> None: ...
    def stream_closed(self) -> None: ...

    def served_elsewhere(self) -> None:
        self.elsewhere += 1

    def decided(self, exchange: Exchange, seconds: float) -> None:
        outcome = "routed" if exchange.is_routed else "answered"
        self.decisions.append(exchange.refusal.value if exchange.refusal else outcome)

    def leg_failed(self, leg: Role, reason: Reason, *, retried: bool) -> None:
        self.failures.append((leg, reason, retried))

    def leg_unseen(self) -> None:
        self.unseen += 1


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
            return (
                Say(step.request, step.stream, self._bodies(step, key)) if self.mode is Supervise.FIRST_EVENT else None
            )
        kept = []
        for message in step.messages:
            kind = message.WhichOneof("request")
            at = self._phases.get(key, 1 if self.mode is Supervise.OFF else 0)
            if kind in LEG_ORDER and (at == LEG_ORDER.index(kind) or (at == 3 and kind == "response_body")):
                is_last = kind != "request_headers" and getattr(message, kind).end_of_stream
                after = min(at + 1, 3) if kind != "response_body" else 2
                self._phases[key] = len(LEG_ORDER) + 1 if is_last else after
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
    hosts = stage.fleet.load.by_url.values()
    return {
        "answers": [[str(answer) for answer in stream.context.answers()] for stream in stage.streams],
        "tokens": [[rank.tokens for rank in host.ranks] for host in hosts],
        "health": [(host.health.answers, host.health._failures, host.health.ejections) for host in hosts],
        "decisions": list(watcher.decisions),
        "failures": list(watcher.failures),
        "missing": watcher.unseen,
        "elsewhere": watcher.elsewhere,
        "queue": len(stage.queue),
    }


async def _play(script: list[Say | End | Wait], mode: Supervise, *, new: bool, limits: dict[str, int]) -> list[Any]:
    watcher: Any = Watcher() if new else OldWatcher()
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


@settings(max_examples=60, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck))
@given(SCRIPTS, st.sampled_from(Supervise), st.sampled_from([{}, {"max_requests": 1}]))
def test_both_machines_agree(script: list[Say | End | Wait], mode: Supervise, limits: dict[str, int]) -> None:
    """Replies, reservations, health and reports are the same after each step."""
    old = run(_play(script, mode, new=False, limits=limits))
    new = run(_play(script, mode, new=True, limits=limits))
    for step, before, after in zip([*script, "the end"], old, new, strict=True):
        for what in before:
            assert before[what] == after[what], (step, what)
