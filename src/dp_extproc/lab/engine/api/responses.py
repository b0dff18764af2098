"""Serve ``/v1/responses``, OpenAI's newer API. Its streams have headers at once."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from dp_extproc.lab.engine.api.errors import failed, json_response
from dp_extproc.lab.engine.api.exchange import Exchange, event, integer, missing, wrong_type
from dp_extproc.lab.engine.api.generate import DEFAULT_MAX_NEW_TOKENS
from dp_extproc.lab.engine.leg import Failure
from dp_extproc.lab.engine.text import chat_prompt, output_text
from dp_extproc.lab.engine.ticket import Ticket


async def responses(exchange: Exchange) -> Response:
    """Answer a request to ``/v1/responses``."""
    body = exchange.parse()
    fields = exchange.fields(body)
    if body.get("input") is None:
        raise missing("input", body)
    limit = integer(body, "max_output_tokens")
    limit = DEFAULT_MAX_NEW_TOKENS if limit is None else limit
    exchange.submit(fields, [_prompt(body)], limit)
    page = _Page(body, limit)
    if exchange.streaming:
        return exchange.stream(_events(exchange, page))
    if (failure := await exchange.finish()) is not None:
        return failed(exchange.path, failure)
    (ticket,) = exchange.tickets
    text = "".join(map(output_text, ticket.tokens))
    return json_response(page.whole("incomplete", text, ticket))


def _prompt(body: dict[str, Any]) -> bytes:
    given = body["input"]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise wrong_type("input", body["input"], "list")
    if body.get("instructions"):
        given = [{"role": "system", "content": body["instructions"]}, *given]
    return chat_prompt(given, body.get("tools"))


class _Page:
    """Build the response object and its parts."""

    def __init__(self, body: dict[str, Any], limit: int) -> None:
        self._body = body
        self._limit = limit
        self._id = f"resp_{uuid.uuid4().hex}"
        self.item_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())

    def part(self, text: str) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        kind = {"role": "assistant", "status": status, "type": "message", "phase": "final_answer"}
        return {"id": self.item_id, "content": content, **kind}

    def whole(self, status: str, text: str | None = None, ticket: Ticket | None = None) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._body.get("model") or "default",
            "output": [] if text is None else [self.item("completed", [self.part(text)])],
            "status": status,
            "usage": None if ticket is None else _usage(ticket),
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self._body.get("instructions"),
            "max_output_tokens": self._limit,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": True,
            "temperature": self._body.get("temperature"),
            "top_p": self._body.get("top_p"),
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "user": self._body.get("user"),
            "metadata": self._body.get("metadata") or {},
        }


def _usage(ticket: Ticket) -> dict[str, Any]:
    prompt, output = ticket.leg.prompt_tokens, len(ticket.tokens)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": ticket.work.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }


async def _events(exchange: Exchange, page: _Page) -> AsyncIterator[str]:
    (ticket,) = exchange.tickets
    number = 0

    def emit(kind: str, **content: Any) -> str:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number - 1, **content}, kind)

    place = {"item_id": page.item_id, "output_index": 0, "content_index": 0}
    yield emit("response.created", response=page.whole("in_progress"))
    yield emit("response.in_progress", response=page.whole("in_progress"))
    begun = False
    async for update in exchange.updates():
        if isinstance(update.end, Failure):
            status = update.end.status or 500
            error = {"code": "server_error" if status >= 500 else "invalid_prompt", "message": update.end.message}
            yield emit("response.failed", response={**page.whole("failed"), "error": error})
            return
        if not begun:
            begun = True
            yield emit("response.output_item.added", output_index=0, item=page.item("in_progress", []))
            yield emit("response.content_part.added", **place, part=page.part(""))
        if update.has_tokens:
            yield emit("response.output_text.delta", **place, delta=update.text, logprobs=[])
    text = "".join(map(output_text, ticket.tokens))
    yield emit("response.output_text.done", **place, text=text, logprobs=[])
    yield emit("response.content_part.done", **place, part=page.part(text))
    yield emit("response.output_item.done", output_index=0, item=page.item("completed", [page.part(text)]))
    whole = page.whole("incomplete", text, ticket)
    yield emit("response.completed", response=whole)
