"""Serve the bootstrap port of a prefill engine.

``/route``, ``/health`` and ``/query_dp_ranks`` are SGLang's (``CommonKVBootstrapServer``). ``POST /rendezvous`` is the
stand-in's own, for the ZMQ messages and the KV transfer. Decode names the destination of the cache; the answer comes
when the cache has been sent, and closing the connection is decode's ABORT. There is no authentication, as in SGLang.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dp_extproc.lab.engine.api.faults import BOOTSTRAP, Faults
from dp_extproc.lab.engine.bootstrap_fields import prefill_facts
from dp_extproc.lab.engine.prefill_side import PrefillSide
from dp_extproc.lab.engine.settings import Settings


def bootstrap_app(settings: Settings, side: PrefillSide, faults: Faults) -> Starlette:
    """Build the application of a prefill engine's bootstrap port."""

    async def route(request: Request) -> Response:
        by_name = settings.release.routes_by_field
        key = "prefill_dp_rank" if by_name else "target_dp_group"
        try:
            rank = int(request.query_params.get(key, ""))
        except ValueError:
            return PlainTextResponse("Missing inputs for bootstrap server.", 400)
        if rank == -1:
            return JSONResponse(prefill_facts(settings))
        if not 0 <= rank < settings.dp_size:
            return PlainTextResponse("Bootstrap info not Found", 404)
        return JSONResponse({"rank_ip": settings.host, "rank_port": settings.bootstrap_port})

    async def query_dp_ranks(request: Request) -> Response:
        rooms = (await request.json()).get("bootstrap_rooms", [])
        return JSONResponse({str(room): side.registered[room] for room in rooms if room in side.registered})

    async def rendezvous(request: Request) -> Response:
        wanted = await request.json()
        if not side.understands(wanted["prefill_dp_rank"], wanted["transfer_backend"], wanted["metadata_buffers"]):
            await _disconnected(request)
            return Response(status_code=499)
        destination = side.connect(wanted["prefill_dp_rank"], wanted["bootstrap_room"])
        gone = asyncio.ensure_future(_disconnected(request))
        either: set[asyncio.Future[Any]] = {destination, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not destination.done():
            side.disconnect(wanted["prefill_dp_rank"], wanted["bootstrap_room"], destination)
            return Response(status_code=499)
        return JSONResponse({"bootstrap_room": wanted["bootstrap_room"], "cached_tokens": destination.result()})

    async def health(_: Request) -> Response:
        return PlainTextResponse("OK")

    faulty = partial(_faulty, faults)
    return Starlette(
        routes=[
            Route("/route", faulty(route)),
            Route("/query_dp_ranks", faulty(query_dp_ranks), methods=["POST"]),
            Route("/rendezvous", faulty(rendezvous), methods=["POST"]),
            Route("/health", faulty(health)),
        ]
    )


def _faulty(faults: Faults, healthy: Callable[[Request], Awaitable[Response]]) -> Any:
    async def endpoint(request: Request) -> ASGIApp:
        return await faults.answer(BOOTSTRAP, request, lambda: healthy(request))

    return endpoint


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
