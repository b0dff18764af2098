"""Replies that settle a request: where it goes, or what the client gets without an engine."""

from collections.abc import Iterable
from typing import Final

from dp_extproc import contract
from dp_extproc.attempt.events import Immediate, Mutate, Phase
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Decision

Headers = tuple[tuple[str, bytes], ...]

_JSON: Final = ("content-type", "application/json")


def route(
    phase: Phase,
    decision: Decision,
    headers: Headers,
    body: bytes | None = None,
    *,
    foreign: Iterable[str] = (),
    picks: bool = False,
) -> Mutate:
    """Let a request go where it was decided.

    Args:
        phase: What is replied to.
        decision: Where to.
        headers: To be set.
        body: The new one, in lock-step.
        foreign: Headers of the client's that must not go along.
        picks: Whether to say it in the way of the endpoint-picker protocol.
    """
    destination = None
    if picks:
        address = dict(headers)[contract.DECODE_HOST]
        headers = ((contract.DESTINATION, address), *(each for each in headers if each[0] != contract.DECODE_HOST))
        destination = address.decode()
    kept = {name for name, _ in headers} if foreign else ()
    return Mutate(
        phase,
        set_headers=headers,
        remove_headers=tuple(name for name in foreign if name not in kept),
        body=body,
        clear_route_cache=True,  # the routes match on the headers that are set here
        metadata=decision.metadata,
        destination=destination,
    )


def refuse(refusal: Rejection) -> Immediate:
    """Refuse a request."""
    reason = refusal.reason.value
    headers = (_JSON, (contract.REASON_HEADER, reason), *refusal.headers)
    return Immediate(refusal.status, refusal.body(), headers, reason, {contract.META_REASON: reason})


def tell_models(text: bytes) -> Immediate:
    """Answer a question for the models."""
    return Immediate(200, text, (_JSON,), "models", {contract.META_REASON: "models"})


def answer_instead(status: int, body: bytes, reason: Reason, headers: Headers) -> Immediate:
    """Answer in the engine's place: with an error of ours, or with what the other leg said."""
    texts = tuple((name, value.decode("latin-1")) for name, value in headers)
    own = () if reason is Reason.ENGINE_REFUSED else ((contract.REASON_HEADER, reason.value),)
    return Immediate(status, body, (_JSON, *own, *texts), reason.value, {contract.META_REASON: reason.value})
