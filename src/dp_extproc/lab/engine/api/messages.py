"""Serve ``/v1/messages``, Anthropic's API. Its streams have headers at once; errors inside the engine are masked."""

import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from dp_extproc.lab.engine.api.errors import anthropic_error, failed, json_response
from dp_extproc.lab.engine.api.exchange import Exchange, event, integer, missing, wrong_type
from dp_extproc.lab.engine.leg import Failure
from dp_extproc.lab.engine.text import chat_prompt, output_text
from dp_extproc.lab.engine.ticket import Ticket


async def messages(exchange: Exchange) -> Response:
    """Answer a request to ``/v1/messages``."""
    body = exchange.parse()
    fields = exchange.fields(body)
    for name in ("messages", "max_tokens"):
        if body.get(name) is None:
            raise missing(name, body)
    conversation = body["messages"]
    if not isinstance(conversation, list) or not conversation:
        raise wrong_type("messages", conversation, "list")
    if body.get("system"):
        conversation = [{"role": "system", "content": body["system"]}, *conversation]
    exchange.submit(fields, [chat_prompt(conversation, body.get("tools"))], integer(body, "max_tokens") or 1)
    head = {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body.get("model") or "default",
    }
    if exchange.streaming:
        return exchange.stream(_events(exchange, head))
    if (failure := await exchange.finish()) is not None:
        return failed(exchange.path, failure)
    (ticket,) = exchange.tickets
    content = [{"type": "text", "text": "".join(map(output_text, ticket.tokens))}]
    usage = {**_input_usage(exchange, ticket), "output_tokens": len(ticket.tokens)}
    return json_response({**head, "content": content, "stop_reason": "max_tokens", "usage": usage})


async def _events(exchange: Exchange, head: dict[str, Any]) -> AsyncIterator[str]:
    (ticket,) = exchange.tickets
    begun = False
    async for update in exchange.updates():
        if isinstance(update.end, Failure):
            yield event(anthropic_error(update.end.status or 500, update.end.message), "error")
            return
        if not begun:
            begun = True
            usage = {**_input_usage(exchange, ticket), "output_tokens": 0}
            message = {**head, "content": [], "usage": usage}  # what is null is left out everywhere (serving.py)
            yield event({"type": "message_start", "message": message}, "message_start")
            block = {"type": "text", "text": ""}
            yield event({"type": "content_block_start", "index": 0, "content_block": block}, "content_block_start")
        if update.has_tokens:
            delta = {"type": "text_delta", "text": update.text}
            yield event({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")
    yield event({"type": "content_block_stop", "index": 0}, "content_block_stop")
    usage = {**_input_usage(exchange, ticket), "output_tokens": len(ticket.tokens)}
    yield event({"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": usage}, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")


def _input_usage(exchange: Exchange, ticket: Ticket) -> dict[str, int]:
    """Count cached tokens apart, as Anthropic does, if the engine reports them."""
    cached = ticket.work.cached_tokens if exchange.engine.settings.enable_cache_report else 0
    usage = {"input_tokens": ticket.leg.prompt_tokens - cached}
    return usage | ({"cache_read_input_tokens": cached} if cached else {})
