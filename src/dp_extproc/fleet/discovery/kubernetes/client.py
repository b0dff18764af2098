"""Sends the two requests of discovery to an API server: a page of a list, and a watch.

No client library of Kubernetes is used: see the decision in docs/development.md.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import httpx
import msgspec

from dp_extproc import __version__
from dp_extproc.fleet.discovery.kubernetes.access import Access
from dp_extproc.fleet.discovery.kubernetes.faults import ApiError, Request, fault_of, read_status
from dp_extproc.fleet.discovery.kubernetes.objects import Event, Page

_CONNECT_SECONDS: Final = 10.0
_LIST_SECONDS: Final = 60.0
"""The longest pause within a list; the API server itself ends a request after 60 s."""
_LONGEST_LINE: Final = 16 << 20
"""Bytes of one line of a watch. An object has at most 1.5 MiB, because etcd refuses larger ones."""
_LONGEST_ERROR: Final = 64 << 10
"""Bytes of an error response that are read."""
_FAULTS: Final = (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError)
"""What httpx raises: ValueError for what cannot be a name or a header, OSError for TLS errors that it does not map."""
_PAGE: Final = msgspec.json.Decoder(Page)
_EVENT: Final = msgspec.json.Decoder(Event)


@dataclass(frozen=True, slots=True)
class Resource:
    """The objects to read."""

    group: str
    """Empty for the core group."""
    version: str
    plural: str
    selector: str
    """Label selector; empty for all objects."""
    namespace: str
    name: str = ""
    """Name of the only object to read; empty for all that the selector matches."""

    @property
    def path(self) -> str:
        base = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{base}/namespaces/{self.namespace}/{self.plural}"

    @property
    def parameters(self) -> dict[str, str]:
        """Return the query parameters that select the objects."""
        if self.name:
            return {"fieldSelector": f"metadata.name={self.name}"}
        return {"labelSelector": self.selector} if self.selector else {}

    def request(self, verb: str) -> Request:
        return Request(verb, f"{self.plural}.{self.group}".rstrip("."), self.namespace)


class ApiClient:
    """Reads one resource from one API server."""

    def __init__(self, access: Access, resource: Resource, client: httpx.AsyncClient, line_timeout: float) -> None:
        """Use a client; *line_timeout* is the longest time in seconds without a line of a watch."""
        self._access = access
        self._resource = resource
        self._client = client
        self._line_timeout = line_timeout

    async def page(self, parameters: dict[str, str]) -> Page:
        """Read one page of the list.

        Raises:
            ApiError: There is none.
        """
        async with self._response("list", parameters, _LIST_SECONDS) as response:
            text = await response.aread()
        try:
            return _PAGE.decode(text)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ApiError(f"{self._what('list')}: the answer is no list of Kubernetes ({error})") from None

    async def events(self, parameters: dict[str, str]) -> AsyncGenerator[list[Event]]:
        """Open a watch. Yield its events, several at once if they arrive so, until the API server ends it.

        The first list has no events. It marks that the watch is open.

        Raises:
            ApiError: The watch cannot be opened, it breaks, or the API server reports an error.
        """
        async with self._response("watch", parameters, self._line_timeout) as response:
            yield []
            rest = b""
            # Not aiter_lines: it ends lines at U+2028 too, which may stand in a JSON string.
            async for piece in response.aiter_bytes():
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    raise ApiError(f"{self._what('watch')}: a line has more than {_LONGEST_LINE >> 20} MiB")
                events: list[Event] = []
                fault = self._decode(lines, events)
                if events:
                    yield events
                if fault is not None:
                    raise fault

    def _decode(self, lines: list[bytes], events: list[Event]) -> ApiError | None:
        """Append the events of some lines, up to the first that is a fault, which is returned."""
        for line in lines:
            if line.strip():
                try:
                    event = _EVENT.decode(line)
                except (msgspec.MsgspecError, RecursionError) as error:
                    return ApiError(f"{self._what('watch')}: a line is no event of Kubernetes ({error})")
                if event.type == "ERROR":
                    status = read_status(event.object)
                    return fault_of(status.code or 500, status, self._resource.request("watch"))
                events.append(event)
        return None

    @asynccontextmanager
    async def _response(self, verb: str, parameters: dict[str, str], pause: float) -> AsyncIterator[httpx.Response]:
        opened = False
        try:
            async with self._client.stream(
                "GET",
                self._access.url + self._resource.path,
                params={**self._resource.parameters, **parameters},
                headers={"Accept": "application/json", **self._access.headers()},
                timeout=httpx.Timeout(_CONNECT_SECONDS, read=pause),
                extensions={"sni_hostname": self._access.tls_name} if self._access.tls_name else None,
            ) as response:
                if response.status_code != 200:
                    text = b""
                    async for piece in response.aiter_bytes():
                        text = (text + piece)[:_LONGEST_ERROR]
                        if len(text) == _LONGEST_ERROR:
                            break
                    retry_after = response.headers.get("Retry-After")
                    request = self._resource.request(verb)
                    raise fault_of(response.status_code, read_status(text), request, retry_after)
                opened = True
                yield response
        except _FAULTS as error:
            # A load balancer, or an API server that ends, may cut a watch at any time: the next try shows a failure.
            quiet = opened and verb == "watch"
            raise ApiError(f"{self._what(verb)}: {_reason(error)}", quiet=quiet) from error

    def _what(self, verb: str) -> str:
        return f"{verb} {self._resource.plural} at {self._access.url}"


@asynccontextmanager
async def open_client(access: Access, resource: Resource, line_timeout: float) -> AsyncIterator[ApiClient]:
    """Open the connections of one client.

    Proxies of the environment are not used, because they are for requests that leave the cluster.
    """
    try:
        client = httpx.AsyncClient(
            verify=access.tls or False,
            trust_env=False,
            proxy=access.proxy,
            headers={"User-Agent": f"dp-extproc/{__version__}"},
        )
    except (*_FAULTS, ImportError) as error:
        raise ApiError(f"the proxy {access.proxy} cannot be used ({error}); write an HTTP proxy as proxy-url") from None
    async with client:
        yield ApiClient(access, resource, client, line_timeout)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"no answer in time ({type(error).__name__}); check the network policies between this pod and it"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return f"its certificate is not trusted ({error}); check ca.crt of the service account, or of the kubeconfig"
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    detail = cause.strerror if isinstance(cause, OSError) else str(error) or type(error).__name__
    return f"{detail}; check that the API server is up and can be reached"
