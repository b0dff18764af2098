"""Serve ``/generate``, SGLang's own API. Its streams have their headers at once, whatever happens later."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from dp_extproc.lab.engine.api.errors import failed, json_response
from dp_extproc.lab.engine.api.exchange import DONE, Exchange, event, integer, wrong_type
from dp_extproc.lab.engine.api.fields import RoutingFields
from dp_extproc.lab.engine.api.prompts import read_texts, unknown_id
from dp_extproc.lab.engine.leg import Failure, Finished, RefusedError
from dp_extproc.lab.engine.logprobs import Logprobs, read_logprobs
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.text import output_text
from dp_extproc.lab.engine.ticket import Ticket

DEFAULT_MAX_NEW_TOKENS = 128
"""SGLang's default of ``max_new_tokens``. It is here also for chats without a limit, which SGLang lets fill the
context."""


async def generate(exchange: Exchange) -> Response:
    """Answer a request to ``/generate``."""
    body = exchange.parse()
    fields = exchange.fields(body)
    try:
        prompts, is_batch, limit, samples = _read(body)
        scores = [read_logprobs(body, prompt, index) for index, prompt in enumerate(prompts)]
        unknown = unknown_id(body.get("input_ids"), exchange.engine.settings.vocabulary_size)
        exchange.submit(fields, prompts, limit, samples=samples, is_batch=is_batch, unknown_id=unknown)
    except RefusedError as error:
        if not exchange.streaming:
            raise
        exchange.record.refuse(400, error.message)
        return exchange.stream(_refusal(error))
    answers = Answers(exchange, scores)
    many = is_batch or samples > 1
    if exchange.streaming:
        return exchange.stream(_events(exchange, answers, many=many))
    if (failure := await exchange.finish()) is not None:
        return failed(exchange.path, failure)
    found = [answers.of(index, len(ticket.tokens), ticket.end) for index, ticket in enumerate(exchange.tickets)]
    return json_response(found if many else found[0])


class Answers:
    """Build the answers of the sequences of a request."""

    def __init__(self, exchange: Exchange, scores: Sequence[Logprobs | None]) -> None:
        """Start without answers.

        Args:
            exchange: The request, submitted.
            scores: The log probabilities that are wanted for each prompt.
        """
        self._exchange = exchange
        self._scores = scores

    def of(self, index: int, count: int, end: Finished | Failure | None) -> dict[str, Any]:
        """Build the answer of one sequence, with so many tokens."""
        exchange = self._exchange
        ticket = exchange.tickets[index]
        ids = ticket.tokens[:count]
        role = exchange.engine.settings.role
        info = meta_info(ticket, role, count, end)
        if (score := self._scores[index // exchange.samples]) is not None:
            info |= score.members(role, ids)
        return {"text": "".join(map(output_text, ids)), "output_ids": ids, "meta_info": info}


def _read(body: dict[str, Any]) -> tuple[list[bytes], bool, int, int]:
    for name in ("text", "input_ids"):
        if body.get(name) is not None:
            prompts, is_batch = read_texts(name, body[name])
            break
    else:
        raise RefusedError("Either text, input_ids or input_embeds should be provided.")
    parameters = body.get("sampling_params") or {}
    if isinstance(parameters, list):
        parameters = parameters[0] if parameters else {}
    if not isinstance(parameters, dict):
        raise wrong_type("sampling_params", parameters, "dict")
    limit = integer(parameters, "max_new_tokens")
    return prompts, is_batch, DEFAULT_MAX_NEW_TOKENS if limit is None else limit, integer(parameters, "n") or 1


async def _refusal(error: RefusedError) -> AsyncIterator[str]:
    kind = {"type": "invalid_request_error", "code": 400, "retryable": False}
    yield event({"error": {"message": error.message, **kind}})
    yield DONE


async def _events(exchange: Exchange, answers: Answers, *, many: bool) -> AsyncIterator[str]:
    async for update in exchange.updates():
        answer = answers.of(update.index, update.tokens, update.end)
        yield event({**answer, "index": update.index} if many else answer)
    yield DONE


def meta_info(ticket: Ticket, role: Role, count: int, end: Finished | Failure | None) -> dict[str, Any]:
    """Describe a finished sequence; ``dp_rank`` is the only field in which SGLang reports the rank."""
    cached = ticket.work.cached_tokens
    info: dict[str, Any] = {
        "id": ticket.leg.rid,
        "finish_reason": _finish_reason(end),
        "prompt_tokens": ticket.leg.prompt_tokens,
        "weight_version": "default",
        "num_retractions": 0,
        **_scheduler_times(ticket, role),
        "reasoning_tokens": 0,
        "completion_tokens": count,
        "cached_tokens": cached,
        "cached_tokens_details": {"device": cached, "host": 0} if cached else None,
        "dp_rank": ticket.work.dp_rank,
    }
    if end is not None and ticket.ended_at is not None:
        info |= {"weight_versions": [{"version": "default", "start": 0, "end": count}]}
        info |= _server_times(ticket, role, count, ticket.ended_at)
    elif count == 1:
        info["response_sent_to_client_ts"] = time.time()
    return info


def _scheduler_times(ticket: Ticket, role: Role) -> dict[str, float]:
    begun = ticket.work.started_at or ticket.received_at
    times = {"forward_entry_time": begun, "queue_time": max(0.0, begun - ticket.queued_at)}
    if role is not Role.DECODE:
        times |= {"storage_prefetch_wait": 0.0, "storage_staging_wait": 0.0}
        times["prefill_finished_time"] = ticket.first_token_at or begun
    return times


def _server_times(ticket: Ticket, role: Role, count: int, ended_at: float) -> dict[str, float]:
    first = ticket.first_token_reported_at(role) or ended_at
    times = {
        "e2e_latency": ended_at - ticket.received_at,
        "request_received_ts": ticket.received_at,
        "api_server_dispatch_finish_ts": ticket.received_at,
        "first_token_latency": first - ticket.received_at,
        "request_finished_ts": ended_at,
        "response_sent_to_client_ts": time.time(),
    }
    if count > 1 and ended_at > first:
        times["decode_throughput"] = (count - 1) / (ended_at - first)
    return times


def _finish_reason(end: Finished | Failure | None) -> dict[str, Any] | None:
    if end is None:
        return None
    if isinstance(end, Finished):
        return {"type": "length", "length": end.length}
    return {"type": "abort", "message": end.message, "status_code": end.status, "err_type": None}


def probe_fields() -> RoutingFields:
    """Return the routing fields of the probe of ``/health_generate``: SGLang's fake bootstrap host and room 0."""
    return RoutingFields(rid=f"HEALTH_CHECK_{uuid.uuid4().hex}", bootstrap_host="2.2.2.2", bootstrap_room=0)
