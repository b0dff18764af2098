"""Serve the HTTP of the stand-in engine: its API, its pages, and those under ``/debug`` for tests."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dp_extproc.lab.engine.api import errors, loads, metrics, other_routes, pages, unroutable, vllm
from dp_extproc.lab.engine.api.completions import chat, completions
from dp_extproc.lab.engine.api.exchange import LISTENER, Exchange
from dp_extproc.lab.engine.api.faults import BOOTSTRAP, INFERENCE, SCHEDULER, Fault, Faults, Kind
from dp_extproc.lab.engine.api.fields import InvalidBodyError, InvalidTypeError
from dp_extproc.lab.engine.api.generate import generate
from dp_extproc.lab.engine.api.journal import Journal, Noted, Record
from dp_extproc.lab.engine.api.messages import messages
from dp_extproc.lab.engine.api.responses import responses
from dp_extproc.lab.engine.bootstrap_server import bootstrap_app
from dp_extproc.lab.engine.engine import Engine, kill_engine
from dp_extproc.lab.engine.leg import RefusedError
from dp_extproc.lab.engine.listener import Listener
from dp_extproc.lab.engine.scheduler.work import Role
from dp_extproc.lab.engine.settings import EngineKind, Settings
from dp_extproc.lab.engine.ticket import Ticket

_INFERENCE: Final[dict[str, Callable[[Exchange], Awaitable[Response]]]] = {
    "/generate": generate,
    "/v1/completions": completions,
    "/v1/chat/completions": chat,
    "/v1/responses": responses,
    "/v1/messages": messages,
    **dict.fromkeys(unroutable.GENERATING, unroutable.generating),
    **dict.fromkeys(unroutable.EMBEDDING, unroutable.embedding),
}
_LAX: Final = frozenset({"/generate", "/encode", *unroutable.GENERATING})
"""Paths that do not require a declared content type."""
_FROM_ANYWHERE: Final = Middleware(
    CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
)
"""CORS as in ``http_server.py``; ``vary: Origin`` comes from it."""
_OPEN_TO_ALL: Final = ("/health", "/ready", "/metrics", "/debug")
"""Prefixes without authentication (``utils/auth.py``), and those of the stand-in."""
_NUMBER: Final = re.compile(r"[0-9]{1,18}")


class Server:
    """One stand-in engine with its HTTP listeners, journal and faults."""

    def __init__(self, settings: Settings, *, kill: Callable[[str], None] = kill_engine) -> None:
        """Build it; nothing runs yet."""
        self.settings = settings
        self.engine = Engine(settings, on_end=self._ended, kill=kill)
        self.journal = Journal()
        self.faults = Faults()
        self.listeners = {INFERENCE: Listener(self.app(), settings.host, settings.port, settings.tls)}
        if settings.rank_listeners:
            for rank in range(settings.dp_size):
                name = f"{INFERENCE} {rank}" if rank else INFERENCE
                self.listeners[name] = Listener(
                    _OfRank(self.app(), rank), settings.host, settings.port + rank, settings.tls
                )
        if settings.role is Role.PREFILL:
            app = bootstrap_app(settings, self.engine.prefill_side, self.faults)
            self.listeners[BOOTSTRAP] = Listener(app, settings.host, settings.bootstrap_port)
        if settings.debug_port is not None:
            self.listeners["debug"] = Listener(Starlette(routes=self._debug()), settings.host, settings.debug_port)
        self._metrics = metrics.Metrics(self.engine)
        self._is_draining = False
        self._warm_at = time.monotonic() + settings.warm_up

    async def drain(self, seconds: float) -> None:
        """Report that the engine is not ready, and look every so many seconds whether a request runs, until none does.

        SGLang (``sigterm_watchdog``) does the same. It still takes requests.
        """
        self._is_draining = True
        await asyncio.sleep(seconds)
        while self.journal.is_busy:  # noqa: ASYNC110 - as SGLang does
            await asyncio.sleep(seconds)

    def app(self) -> ASGIApp:
        """Build the application of the API port."""
        if self.settings.kind is EngineKind.VLLM:
            return self._vllm_app()
        release = self.settings.release
        routes = [Route(path, self._inference, methods=["POST"]) for path in _INFERENCE]
        routes.append(Route("/generate", self._inference, methods=["PUT"]))
        routes += [
            Route("/v1/models", self._page("models", self._models)),
            Route("/health", self._page("health", self._health)),
            Route("/health_generate", self._page("health", self._health)),
            Route("/get_server_info", self._page("server_info", self._server_info)),
            Route("/get_model_info", self._page("model_info", self._model_info)),
            Route("/abort_request", self._abort_request, methods=["POST"]),
            Route("/pd_role_switch", self._role_switch, methods=["POST"]),
            Route("/flush_cache", self._flush_cache, methods=["GET", "POST"]),
            *self._other_routes(),
            *self._debug(),
        ]
        if release.has_server_info:
            routes.append(Route("/server_info", self._page("server_info", self._server_info)))
            routes.append(Route("/model_info", self._page("model_info", self._model_info)))
        if release.has_ready:
            routes.append(Route("/ready", self._ready))
        if release.has_loads:
            routes.append(Route("/v1/loads", self._page("loads", self._loads)))
        if release.has_get_load:
            routes.append(Route("/get_load", self._page("loads", self._get_load)))
        if self.settings.enable_metrics:
            routes.append(Route("/metrics", self._page("metrics", self._metrics_page)))
        app = Starlette(routes=routes, middleware=[_FROM_ANYWHERE], exception_handlers={HTTPException: _detail})
        return _Authentication(app, self.settings.api_key)

    def _vllm_app(self) -> ASGIApp:
        routes = [Route(path, self._inference, methods=["POST"]) for path in vllm.PATHS]
        routes += [
            Route("/v1/models", self._page("models", self._models)),
            Route("/version", self._page("server_info", self._vllm_version)),
            Route("/metrics", self._page("metrics", self._vllm_metrics)),
            Route("/health", self._ready),
            *self._other_routes(),
            *self._debug(),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _detail})
        # vLLM asks for the key below /v1 only.
        return _Authentication(app, self.settings.api_key, ("/health", "/metrics", "/version", "/debug"))

    async def _vllm_version(self, _: Request) -> Response:
        return errors.json_response({"version": self.settings.vllm_version})

    async def _vllm_metrics(self, _: Request) -> Response:
        return Response(vllm.metrics_page(self.engine), headers={"content-type": metrics.CONTENT_TYPE})

    def _other_routes(self) -> list[Route]:
        routes = other_routes.other_routes(self.settings)
        return [Route(path, self._other, methods=list(methods)) for path, methods in routes.items()]

    async def _other(self, request: Request) -> ASGIApp:
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        record = self.journal.open(request.method, request.url.path, _joined(request.headers), body)
        return Noted(await other_routes.answer(request, self.settings), record)

    def _debug(self) -> list[Route]:
        return [
            Route("/debug/requests", self._debug_requests, methods=["GET", "DELETE"]),
            Route("/debug/requests/{number:int}/body", self._debug_body),
            Route("/debug/steps", self._debug_steps),
            Route("/debug/faults", self._debug_faults, methods=["GET", "POST"]),
        ]

    async def _inference(self, request: Request) -> ASGIApp:
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        record = self.journal.open(request.method, request.url.path, _joined(request.headers), body)
        fault = self.faults.take(INFERENCE)
        if fault is not None:
            record.fault = str(fault.kind)
        answer = await self.faults.spoil(fault, INFERENCE, request, lambda: self._infer(request, record, fault))
        return Noted(answer, record)

    async def _infer(self, request: Request, record: Record, fault: Fault | None) -> Response:
        path = request.url.path
        fails_after = fault.after if fault is not None and fault.kind is Kind.FAIL else None
        exchange = Exchange(self.engine, request, record, fails_after)
        try:
            _check_content_type(path, request.headers)
            return await _INFERENCE[path](exchange)
        except InvalidBodyError as error:
            record.refuse(400, str(error.errors))
            return errors.invalid_body(path, error)
        except InvalidTypeError as error:
            record.refuse(400, str(error))
            return errors.invalid_type(error)
        except RefusedError as error:
            record.refuse(400, error.message)
            return vllm.refused(error) if self.settings.kind is EngineKind.VLLM else errors.refused(path, error)
        except IndexError as error:  # a list of rooms that is shorter than the batch
            record.refuse(500, str(error))
            return PlainTextResponse("Internal Server Error", 500)

    def _ended(self, ticket: Ticket) -> None:
        self._metrics.requests.ended(ticket)

    def _page(self, name: str, healthy: Callable[[Request], Awaitable[Response]]) -> Any:
        async def endpoint(request: Request) -> ASGIApp:
            return await self.faults.answer(name, request, lambda: healthy(request))

        return endpoint

    async def _models(self, _: Request) -> Response:
        return errors.json_response(pages.models(self.settings))

    async def _server_info(self, _: Request) -> Response:
        return errors.json_response(pages.server_info(self.settings, self.engine.present_role))

    async def _model_info(self, _: Request) -> Response:
        return errors.json_response(pages.model_info(self.settings))

    async def _ready(self, _: Request) -> Response:
        return pages.ready(is_draining=self._is_draining or self._is_starting)

    @property
    def _is_starting(self) -> bool:
        return time.monotonic() < self._warm_at

    async def _health(self, request: Request) -> Response:
        if self._is_starting or (self._is_draining and self.settings.release.health_reports_draining):
            return pages.ready(is_draining=True)
        return await pages.health(request, self.engine)

    async def _loads(self, request: Request) -> Response:
        return await loads.loads(request, self.engine)

    async def _get_load(self, _: Request) -> Response:
        return await loads.get_load(self.engine)

    async def _metrics_page(self, _: Request) -> Response:
        return Response(self._metrics.page(), headers={"content-type": metrics.CONTENT_TYPE})

    async def _abort_request(self, request: Request) -> Response:
        try:
            wanted = msgspec.json.decode(await request.body())
            rid, everything = wanted.get("rid", ""), wanted.get("abort_all") is True
        except (msgspec.DecodeError, AttributeError):
            return Response(status_code=400)
        if everything:
            self.engine.abort_all()
        elif isinstance(rid, str):
            self.engine.abort(rid)
        return Response(status_code=200)

    async def _role_switch(self, request: Request) -> Response:
        try:
            role = Role(msgspec.json.decode(await request.body())["new_role"])
        except (msgspec.DecodeError, ValueError, LookupError, TypeError):
            return Response(status_code=400)
        old, problem = self.engine.present_role, self.engine.switch_role(role)
        answer = {"success": problem is None, "message": problem or "ok", "old_role": old, "new_role": role}
        return errors.json_response({**answer, "safe_to_restore": True}, 200 if problem is None else 400)

    async def _flush_cache(self, _: Request) -> Response:
        flushed = self.engine.flush_caches()
        return Response(pages.FLUSHED if flushed else "Flush cache failed.\n", 200 if flushed else 400)

    async def _debug_requests(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.journal.clear()
            return Response(status_code=204)
        after = request.query_params.get("after", "0")
        if not _NUMBER.fullmatch(after):
            return PlainTextResponse("after has to be the number of a request", 400)
        return errors.json_response({"count": self.journal.count, "requests": self.journal.show(int(after))})

    async def _debug_body(self, request: Request) -> Response:
        record = self.journal.find(request.path_params["number"])
        if record is None or record.body is None:
            return PlainTextResponse("no such request, or its body is not kept any more", 404)
        return Response(record.body, media_type="application/octet-stream")

    async def _debug_steps(self, _: Request) -> Response:
        return errors.json_response({"groups": pages.steps(self.engine)})

    async def _debug_faults(self, request: Request) -> Response:
        if request.method == "POST":
            try:
                self.faults.switch(msgspec.json.decode(await request.body(), type=dict[str, Kind | Fault]))
            except (msgspec.DecodeError, ValueError) as error:
                return PlainTextResponse(str(error), 400)
            self.engine.hang(SCHEDULER in self.faults.active)
            for target, listener in self.listeners.items():
                await (listener.close() if self.faults.refuses(target) else listener.open())
        return errors.json_response(self.faults.active)


class _OfRank:
    """Mark requests of the listener of one rank."""

    def __init__(self, app: ASGIApp, rank: int) -> None:
        self._app = app
        self._rank = rank

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[LISTENER] = self._rank
        await self._app(scope, receive, send)


class _Authentication:
    """Require the API key as SGLang's middleware does, but for the exempt prefixes and OPTIONS."""

    def __init__(self, app: ASGIApp, api_key: str | None, open_to_all: tuple[str, ...] = _OPEN_TO_ALL) -> None:
        self._app = app
        self._api_key = api_key
        self._open_to_all = open_to_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            await errors.json_response({"error": "Unauthorized"}, 401)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._api_key is None or scope["method"] == "OPTIONS" or scope["path"].startswith(self._open_to_all):
            return True
        return Headers(scope=scope).get("authorization") == f"Bearer {self._api_key}"


def _detail(_: Request, error: Exception) -> Response:
    """Answer an unknown path or method as FastAPI does."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    return errors.json_response({"detail": getattr(error, "detail", "")}, status)


def _check_content_type(path: str, headers: Headers) -> None:
    """Refuse a body that is not declared as JSON.

    Raises:
        InvalidBodyError: It is something else; or not declared at all, which only some paths allow.
    """
    declared = headers.get("content-type", "")
    if path in _LAX:  # FastAPI's own rule: without a type a body is JSON, with a wrong one it is bytes
        if path == "/generate" and declared and "json" not in declared.lower():
            message = "Input should be a dictionary or an instance of GenerateReqInput"
            place = {"type": "dataclass_type", "loc": ("body",)}
            raise InvalidBodyError([{**place, "msg": message, "input": "..."}])
        return
    if declared.lower().split(";", maxsplit=1)[0].strip() != "application/json":  # validate_json_request
        message = "Unsupported Media Type: Only 'application/json' is allowed"
        place = {"type": "value_error", "loc": ("header", "content-type")}
        raise InvalidBodyError([{**place, "msg": message, "input": declared}])


def _joined(headers: Headers) -> dict[str, str]:
    """Return each name once; repeated values are joined with a comma (RFC 9110 section 5.3)."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found
