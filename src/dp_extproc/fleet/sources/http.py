"""Asks one engine for its pages over HTTP, within a time and a size that it cannot exceed."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

import httpx

from dp_extproc.config.load import LoadSettings
from dp_extproc.config.pools import Engine
from dp_extproc.engines.credentials import NO_CREDENTIALS, Credentials
from dp_extproc.engines.listener import EngineFailure, FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, in_url
from dp_extproc.engines.reading import ReaderError
from dp_extproc.engines.sglang.loads_page import read_loads
from dp_extproc.engines.sglang.metrics_page import read_metrics
from dp_extproc.engines.sglang.releases import release_of
from dp_extproc.engines.sglang.server_info import read_server_info
from dp_extproc.engines.vllm.pages import facts_of, read_models, read_version, read_vllm_metrics

FACTS_PATIENCE: Final = 3.0
"""/server_info waits for the schedulers' next step, /v1/loads does not: it may take this many times as long."""
KEEPALIVE_SECONDS: Final = 4.0
"""Shorter than uvicorn's 5 s (``timeout_keep_alive``), or the engine closes a connection as it is used again."""

_PROBED: Final = "x-override-routed-dp-rank"
_NO_RANK: Final = 1_000_000
_ERROR_BYTES: Final = 65_536

_ABSENT: Final = frozenset({404, 405})

Page = TypeVar("Page")


class ScrapeError(Exception):
    """An engine could not be read."""

    def __init__(self, kind: FailureKind, message: str, status: int | None = None) -> None:
        self.failure = EngineFailure(kind, message)
        self.status = status
        super().__init__(message)

    @property
    def is_absent(self) -> bool:
        """Whether the engine is there, but has no such page."""
        return self.status in _ABSENT


def make_client() -> httpx.AsyncClient:
    """Make the one HTTP client that all engines are asked with. Proxies of the environment are not for them."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_SECONDS)
    # Times are limited around whole answers here; httpx limits only the single read.
    return httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)  # noqa: S113 - see above


class EngineClient:
    """The pages of one engine. Every method raises :class:`ScrapeError` and nothing else."""

    def __init__(
        self,
        endpoint: Endpoint,
        settings: LoadSettings,
        client: httpx.AsyncClient,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self.endpoint = endpoint
        self.address = ""
        """``IP:port`` that is asked, and that Envoy is to dial; known after :meth:`resolve`."""
        self._settings = settings
        self._client = client
        # A host name may stand for several addresses: ask exactly the one that is told to Envoy, under its name.
        self._headers = (
            (b"host", f"{in_url(endpoint.host)}:{endpoint.port}".encode()),
            (b"accept-encoding", b"identity"),
        )
        self._credentials = credentials

    async def resolve(self) -> str:
        """Look up the engine's address; IPv4 is preferred, and the known one is kept while it is still right."""
        self.address = f"{await self._look_up()}:{self.endpoint.port}"
        return self.address

    async def facts(self) -> EngineFacts:
        """Ask what the engine is."""
        if self.endpoint.engine is Engine.VLLM:
            return await self._vllm_facts()
        try:
            facts = await self._sglang_facts()
            return await self._with_overrides(facts) if self.endpoint.needs_overrides else facts
        except ScrapeError as error:
            foreign = error.is_absent or error.failure.kind is FailureKind.WRONG_SHAPE
            if self.endpoint.engine is Engine.SGLANG or not foreign:
                raise
            try:
                return await self._vllm_facts()
            except ScrapeError as another:
                raise (error if another.is_absent else another) from None

    async def _sglang_facts(self) -> EngineFacts:
        seconds = self._settings.timeout * FACTS_PATIENCE
        try:
            return await self._read("/server_info", read_server_info, seconds)
        except ScrapeError as error:
            if not error.is_absent:
                raise
        return await self._read("/get_server_info", read_server_info, seconds)  # before 0.5.6

    async def _with_overrides(self, facts: EngineFacts) -> EngineFacts:
        """Find out whether ``x-override-*`` headers are obeyed, which no page tells; None if the answer does not tell.

        The request asks for a rank that no server has, so it is refused whichever of its two errors is seen first; from
        0.5.10 on nothing of it reaches a scheduler.
        """
        if not release_of(facts.version).overrides:
            return replace(facts, reads_overrides=False)
        headers = [*self._headers, (b"content-type", b"application/json"), (_PROBED.encode(), b"probe")]
        headers += [(name.encode(), value) for name, value in self._credentials.headers(self.endpoint.pool)]
        body = b'{"text":"probe","sampling_params":{"max_new_tokens":1},"routed_dp_rank":%d}' % _NO_RANK
        obeys = None
        with suppress(OSError, TimeoutError, httpx.HTTPError):
            async with (
                asyncio.timeout(self._settings.timeout * FACTS_PATIENCE),
                self._client.stream(
                    "POST", f"http://{self.address}/generate", headers=headers, content=body
                ) as response,
            ):
                text = bytearray()
                async for chunk in response.aiter_raw():
                    text += chunk
                    if len(text) > _ERROR_BYTES:
                        break
                obeys = _obeys(response.status_code, bytes(text))
        return replace(facts, reads_overrides=obeys)

    async def _vllm_facts(self) -> EngineFacts:
        seconds = self._settings.timeout * FACTS_PATIENCE
        version = await self._read("/version", read_version, seconds)
        model = await self._read("/v1/models", read_models, seconds)
        return await self._read("/metrics", partial(facts_of, version, model), seconds)

    async def loads(self) -> LoadPage:
        """Ask for ``/v1/loads``."""
        return await self._read("/v1/loads", read_loads, self._settings.timeout)

    async def metrics(self) -> LoadPage:
        """Ask for ``/metrics``."""
        return await self._read("/metrics", read_metrics, self._settings.timeout)

    async def vllm_metrics(self) -> LoadPage:
        """Ask a vLLM server for ``/metrics``."""
        return await self._read("/metrics", read_vllm_metrics, self._settings.timeout)

    async def _look_up(self) -> str:
        host = self.endpoint.host
        try:
            return in_url(str(ipaddress.ip_address(host)))
        except ValueError:
            pass
        try:
            async with asyncio.timeout(self._settings.timeout * FACTS_PATIENCE):
                found = await asyncio.get_running_loop().getaddrinfo(host, self.endpoint.port, type=socket.SOCK_STREAM)
        except TimeoutError:
            raise ScrapeError(FailureKind.UNRESOLVABLE, f"{host} was not resolved in time") from None
        except (OSError, UnicodeError) as error:
            raise ScrapeError(FailureKind.UNRESOLVABLE, f"{host} cannot be resolved: {error}") from None
        found.sort(key=lambda each: each[0] != socket.AF_INET)
        addresses = [in_url(str(each[4][0])) for each in found]
        if not addresses:
            raise ScrapeError(FailureKind.UNRESOLVABLE, f"{host} has no address")
        known = self.address.rpartition(":")[0]
        return known if known in addresses else addresses[0]

    async def _read(self, path: str, read: Callable[[bytes], Page], seconds: float) -> Page:
        page = await self._get(path, seconds)
        try:
            return read(page)
        except ReaderError as error:
            raise ScrapeError(error.kind, str(error)) from None

    async def _get(self, path: str, seconds: float) -> bytes:
        key = [(name.encode(), value) for name, value in self._credentials.headers(self.endpoint.pool)]
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream("GET", f"http://{self.address}{path}", headers=[*self._headers, *key]) as response,
            ):
                return await self._receive(path, response)
        except ScrapeError:
            raise
        except (TimeoutError, httpx.TimeoutException):
            raise ScrapeError(FailureKind.TIMEOUT, f"{path} was not answered within {seconds:g} s") from None
        except httpx.ConnectError:
            message = f"no connection to {self.address}; is the engine running, and can it be reached from here?"
            raise ScrapeError(FailureKind.REFUSED, message) from None
        except Exception as error:  # noqa: BLE001 - no answer whatever may end the watch over the other engines
            detail = str(error) or type(error).__name__
            raise ScrapeError(FailureKind.UNREADABLE, f"{path} got no complete HTTP answer: {detail}") from None

    async def _receive(self, path: str, response: httpx.Response) -> bytes:
        limit = self._settings.max_page_bytes
        if response.status_code != httpx.codes.OK:
            shown = bool(self._credentials.headers(self.endpoint.pool))
            message = _explain(path, response.status_code, key_shown=shown)
            raise ScrapeError(FailureKind.HTTP_STATUS, message, status=response.status_code)
        page = bytearray()
        # Raw: an answer that is compressed against our wish must not unfold in memory.
        async for chunk in response.aiter_raw():
            page += chunk
            if len(page) > limit:
                raise ScrapeError(FailureKind.TOO_LARGE, f"{path} is larger than load.max_page_bytes ({limit})")
        return bytes(page)


def _obeys(status: int, text: bytes) -> bool | None:
    """Tell by the answer to the probe whether its header was obeyed; whatever is no answer to it tells nothing."""
    if status == httpx.codes.OK:
        return False  # a header that is obeyed would have been refused
    if status != httpx.codes.BAD_REQUEST:
        return None
    if _PROBED.encode() in text:
        return True
    return False if b"routed_dp_rank" in text else None


def _explain(path: str, status: int, *, key_shown: bool) -> str:
    message = f"{path} answered {status}"
    if status in {401, 403}:
        # Only /metrics, /health and /ready are open when an API key is set (utils/auth.py).
        if key_shown:
            return f"{message}: the engine refuses the API key of its pool; compare api_key with its --api-key"
        return f"{message}: the engine asks for an API key; tell the pool where it is: api_key: {{file: ...}}"
    if status in _ABSENT and path == "/metrics":
        return f"{message}: start the engine with --enable-metrics"
    if status in _ABSENT and path == "/v1/loads":
        return f"{message}: it exists from SGLang 0.5.8 on; set load.source to auto or metrics"
    if status in _ABSENT:
        return f"{message}: is this an SGLang or vLLM server?"
    return message
