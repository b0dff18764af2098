"""Serve paths of SGLang that build requests without bootstrap fields, which end a disaggregated engine.

They are here to detect a router that forwards them. Their answers on a unified engine are left out.
"""

from typing import Final

from starlette.responses import PlainTextResponse, Response

from dp_extproc.lab.engine.api.errors import error_object, failed, json_response
from dp_extproc.lab.engine.api.exchange import Exchange
from dp_extproc.lab.engine.api.fields import RoutingFields
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.text import ids_prompt

GENERATING: Final = (
    "/v1/score", "/v1/rerank", "/v1/audio/transcriptions", "/api/chat", "/api/generate", "/invocations",
    "/vertex_generate", "/v1/decisions", "/v1/systemone",
)  # fmt: skip
EMBEDDING: Final = ("/v1/embeddings", "/encode", "/v1/classify", "/classify")


async def generating(exchange: Exchange) -> Response:
    """Treat the path's request without a room as a disaggregated engine does."""
    if exchange.engine.settings.role is Role.UNIFIED:
        exchange.record.refuse(501, "not implemented")
        return PlainTextResponse("the strict engine does not implement this path", 501)
    exchange.submit(RoutingFields(), [ids_prompt([0])], 1)
    failure = await exchange.finish()
    return failed(exchange.path, failure) if failure is not None else json_response({})


async def embedding(exchange: Exchange) -> Response:
    """Refuse: this is a generation model."""
    message = "This model does not appear to be an embedding model by default. Please add `--is-embedding`."
    exchange.record.refuse(400, message)
    return json_response(error_object(message, "BadRequestError", 400), 400)
