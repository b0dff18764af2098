"""Serve ``/v1/completions`` and ``/v1/chat/completions``."""

import array
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from starlette.responses import Response

from dp_extproc.lab.engine.api.errors import failed, json_response, stream_error
from dp_extproc.lab.engine.api.exchange import DONE, Exchange, Update, event, integer, missing, wrong_type
from dp_extproc.lab.engine.api.generate import DEFAULT_MAX_NEW_TOKENS
from dp_extproc.lab.engine.api.prompts import read_texts, unknown_id
from dp_extproc.lab.engine.leg import Failure, Finished
from dp_extproc.lab.engine.logprobs import completion_logprobs, echoed_logprobs, spell
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.text import chat_prompt, output_text
from dp_extproc.lab.engine.ticket import Ticket

_DEFAULT_MAX_TOKENS: Final = 16
"""Default of ``/v1/completions``, as in OpenAI's API."""


async def completions(exchange: Exchange) -> Response:
    """Answer a request to ``/v1/completions``."""
    body = exchange.parse()
    fields = exchange.fields(body)
    if body.get("prompt") is None:
        raise missing("prompt", body)
    prompts, is_batch = read_texts("prompt", body["prompt"])
    limit = integer(body, "max_tokens")
    limit = _DEFAULT_MAX_TOKENS if limit is None else limit
    samples, unknown = integer(body, "n") or 1, unknown_id(body["prompt"], exchange.engine.settings.vocabulary_size)
    exchange.submit(fields, prompts, limit, samples=samples, is_batch=is_batch, unknown_id=unknown)
    return await _respond(exchange, _TextForm(body, prompts, exchange.engine.settings.role))


async def chat(exchange: Exchange) -> Response:
    """Answer a request to ``/v1/chat/completions``."""
    body = exchange.parse()
    fields = exchange.fields(body)
    if body.get("messages") is None:
        # protocol.py fills this in before it looks at anything else, so its errors show it
        choice = {} if "tool_choice" in body else {"tool_choice": "auto" if body.get("tools") else "none"}
        raise missing("messages", {**body, **choice})
    messages = body["messages"]
    if not isinstance(messages, list) or not messages:
        raise wrong_type("messages", messages, "list")
    limit = integer(body, "max_completion_tokens", "max_tokens")
    limit = DEFAULT_MAX_NEW_TOKENS if limit is None else limit
    ids = body.get("input_ids") if exchange.engine.settings.release.chats_by_ids else None
    prompts = [chat_prompt(messages, body.get("tools"))] if ids is None else read_texts("input_ids", ids)[0]
    exchange.submit(
        fields,
        prompts,
        limit,
        samples=integer(body, "n") or 1,
        unknown_id=unknown_id(ids, exchange.engine.settings.vocabulary_size),
    )
    return await _respond(exchange, _ChatForm(body))


class _Form:
    """The shapes that differ between the two APIs."""

    whole: str
    chunk: str

    def __init__(self, body: dict[str, Any]) -> None:
        self.model = body.get("model") or "default"
        options = body.get("stream_options") or {}
        self.include_usage = isinstance(options, dict) and options.get("include_usage") is True
        self.continuous_usage = isinstance(options, dict) and options.get("continuous_usage_stats") is True
        self.created = int(time.time())

    def choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        raise NotImplementedError

    def whole_choice(self, index: int, ticket: Ticket) -> dict[str, Any]:
        """Return the choice of a response that is no stream."""
        return self.choice(index, "".join(map(output_text, ticket.tokens)), _reason(ticket.end) or "abort")

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        """Return the ``choices`` entries of one update, each for a chunk of its own."""
        raise NotImplementedError


class _TextForm(_Form):
    whole = chunk = "text_completion"

    def __init__(self, body: dict[str, Any], prompts: list[bytes], role: Role) -> None:
        super().__init__(body)
        top, echo = integer(body, "logprobs"), bool(body.get("echo"))
        self._scores = [None if top is None else echoed_logprobs(prompt, top, echo=echo) for prompt in prompts]
        self._echoes = [_echo(prompt) if echo else "" for prompt in prompts]
        self._role = role
        self._samples = integer(body, "n") or 1

    def whole_choice(self, index: int, ticket: Ticket) -> dict[str, Any]:
        return self._with_prompt(super().whole_choice(index, ticket), index, ticket.tokens, is_first=True)

    def _with_prompt(
        self, choice: dict[str, Any], index: int, output: Sequence[int], *, is_first: bool
    ) -> dict[str, Any]:
        prompt = index // self._samples
        if is_first:
            choice["text"] = self._echoes[prompt] + choice["text"]
        if (wanted := self._scores[prompt]) is not None:
            choice["logprobs"] = completion_logprobs(wanted, self._role, output, is_first=is_first)
        return choice

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, "matched_stop": None}

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        choice = self.choice(update.index, update.text, _reason(update.end))
        output = update.ticket.tokens[update.known : update.tokens]
        return [self._with_prompt(choice, update.index, output, is_first=not update.known)]


class _ChatForm(_Form):
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "reasoning_content": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason, "matched_stop": None}

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        found = []
        if not update.known and (update.has_tokens or not update.tokens):
            found.append(self._delta(update.index, {"role": "assistant", "content": ""}, None))
        if update.has_tokens:
            found.append(self._delta(update.index, {"content": update.text}, None))
        if update.end is not None:
            found.append(self._delta(update.index, {}, _reason(update.end)))
        return found

    @staticmethod
    def _delta(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        delta = {"reasoning_content": None, **delta}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, "matched_stop": None}


async def _respond(exchange: Exchange, form: _Form) -> Response:
    if exchange.streaming:
        if exchange.engine.settings.release.kick_starts:
            await exchange.first()
        return exchange.stream(_events(exchange, form))
    if (failure := await exchange.finish()) is not None:
        return failed(exchange.path, failure)
    tickets = exchange.tickets
    return json_response(
        {
            "id": tickets[0].leg.rid,
            "object": form.whole,
            "created": form.created,
            "model": form.model,
            "choices": [form.whole_choice(index, ticket) for index, ticket in enumerate(tickets)],
            "usage": _usage(exchange),
            "metadata": {
                "weight_version": "default",
                "weight_versions": [{"version": "default", "start": 0, "end": len(tickets[0].tokens)}],
            },
        }
    )


async def _events(exchange: Exchange, form: _Form) -> AsyncIterator[str]:
    head = {"id": exchange.tickets[0].leg.rid, "object": form.chunk, "created": form.created, "model": form.model}
    tail: dict[str, Any] = {"usage": None} if isinstance(form, _TextForm) else {}
    async for update in exchange.updates():
        if isinstance(update.end, Failure) and update.end.status is not None:
            yield event(stream_error(update.end))
            yield DONE
            return
        if form.continuous_usage:
            tail = {"usage": _usage(exchange)}
        for choice in form.chunks(update):
            yield event({**head, "choices": [choice], **tail})
    if form.include_usage:
        yield event({**head, "choices": [], "usage": _usage(exchange)})
    yield DONE


def _usage(exchange: Exchange) -> dict[str, Any]:
    first_samples = exchange.tickets[:: exchange.samples]
    prompt = sum(ticket.leg.prompt_tokens for ticket in first_samples)
    cached = sum(ticket.work.cached_tokens for ticket in first_samples)
    completion = sum(len(ticket.tokens) for ticket in exchange.tickets)
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached} if _reports_cached(exchange, cached) else None,
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }


def _reports_cached(exchange: Exchange, cached: int) -> bool:
    """Check whether cached tokens are in the usage: with the option, and until 0.5.21 only if there are some."""
    settings = exchange.engine.settings
    return settings.enable_cache_report and (cached > 0 or settings.release.since("0.5.22"))


def _echo(prompt: bytes) -> str:
    return "".join(map(spell, array.array("I", prompt)))


def _reason(end: Finished | Failure | None) -> str | None:
    if end is None:
        return None
    return "length" if isinstance(end, Finished) else "abort"
