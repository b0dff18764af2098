"""A stand-in for Kubernetes' API server: lists and watches over real HTTP, as strict as the real one.

It has the part of the API that discovery uses: versions, pages, bookmarks, label selectors, tokens, RBAC, and a history
that can be compacted. Its answers have the form of those that `make kubernetes-run` records from kube-apiserver.
"""

import asyncio
import json
import re
import ssl
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from dp_extproc.lab.testbed.ports import free_port

Manifest = dict[str, Any]
TOKEN = "token-of-the-tests"
SLICES = "endpointslices.discovery.k8s.io"
PODS = "pods"
POOLS = "inferencepools.inference.networking.k8s.io"
_PATHS = {
    "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices": SLICES,
    "/api/v1/namespaces/{}/pods": PODS,
    "/apis/inference.networking.k8s.io/v1/namespaces/{}/inferencepools": POOLS,
}
_KINDS = {
    SLICES: ("discovery.k8s.io/v1", "EndpointSlice"),
    PODS: ("v1", "Pod"),
    POOLS: ("inference.networking.k8s.io/v1", "InferencePool"),
}
_ALL_VERBS = frozenset({"get", "list", "watch"})
_START_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request that was received."""

    verb: str
    resource: str
    parameters: dict[str, str]
    token: str


@dataclass(frozen=True, slots=True)
class _Change:
    version: int
    resource: str
    namespace: str
    before: Manifest | None
    after: Manifest | None


class _Refused(Exception):  # noqa: N818 - an answer, not an error of the test
    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        self.code = code
        self.headers = {"Retry-After": str(details["retryAfterSeconds"])} if "retryAfterSeconds" in details else {}
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
        self.status: Manifest = {**status, "reason": reason, "code": code}
        if details:
            self.status["details"] = details
        self.body = json.dumps(self.status).encode()


@dataclass
class FakeApiServer:
    """The API server, in a thread of its own; a context manager. Its switches may be set at any time."""

    tls: ssl.SSLContext | None = None
    tokens: dict[str, frozenset[str]] = field(default_factory=lambda: {TOKEN: _ALL_VERBS})
    """Accepted tokens, each with the verbs that it may use on everything."""
    bookmarks: float = 0.2
    """Seconds between two bookmarks."""
    silent: bool = False
    """Whether open watches get no line, as if a firewall dropped them."""
    gone_as_status: bool = False
    """Whether a version that is too old is refused with status 410, and not with an event."""
    refuse: tuple[int, dict[str, str], bytes] | None = None
    """Answer of every request: status, headers and body."""
    largest_page: int | None = None
    """The most objects of a page, whatever a request asks for."""
    calls: list[Call] = field(default_factory=list)
    port: int = field(default_factory=free_port)
    version: int = 1000
    oldest: int = 1000
    """The oldest version from which a watch can go on."""
    _objects: dict[tuple[str, str, str], Manifest] = field(default_factory=dict)
    _history: list[_Change] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _connections: set[asyncio.StreamWriter] = field(default_factory=set)
    _raw: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        running: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(running)), name="API server")
        self._thread.start()
        running.result(_START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def put(self, resource: str, manifest: Manifest, namespace: str = "llm") -> None:
        """Create or replace an object."""
        self._call(lambda: self._change(resource, namespace, manifest["metadata"]["name"], manifest))

    def delete(self, resource: str, name: str, namespace: str = "llm") -> None:
        """Delete an object."""
        self._call(lambda: self._change(resource, namespace, name, None))

    def compact(self) -> None:
        """Forget the history: no watch can go on from an earlier version."""

        def forget() -> None:
            self.version += 1
            self.oldest = self.version

        self._call(forget)

    def send(self, raw: bytes) -> None:
        """Send bytes on all open watches, as they are."""

        def append() -> None:
            self._raw.append(raw)
            self._notify()

        self._call(append)

    def cut(self) -> None:
        """Break all connections."""
        self._call(self._cut)

    def stop(self) -> None:
        """Stop listening, and break all connections."""

        async def stop() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None
            self._cut()

        self._await(stop())

    def start(self) -> None:
        """Listen again on the same port; the objects are still there."""
        self._await(self._listen())

    def watches(self) -> list[Call]:
        return [each for each in self.calls if each.verb == "watch"]

    def lists(self) -> list[Call]:
        return [each for each in self.calls if each.verb == "list"]

    def _call(self, work: Callable[[], None]) -> None:
        async def run() -> None:
            work()

        self._await(run())

    def _await(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_SECONDS)

    async def _run(self, running: "Future[None]") -> None:
        self._loop, self._over, self._changed = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        try:
            await self._listen()
        except BaseException as error:
            running.set_exception(error)
            raise
        running.set_result(None)
        await self._over.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)

    def _cut(self) -> None:
        for each in self._connections:
            each.transport.abort()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _change(self, resource: str, namespace: str, name: str, manifest: Manifest | None) -> None:
        key = resource, namespace, name
        before = self._objects.pop(key, None)
        self.version += 1
        after = None
        if manifest is not None:
            meta = {"namespace": namespace, "uid": f"uid-of-{name}"} | manifest["metadata"]
            after = manifest | {"metadata": meta | {"resourceVersion": str(self.version)}}
            self._objects[key] = after
        self._history.append(_Change(self.version, resource, namespace, before, after))
        self._notify()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in head[1:])}
                await self._answer(head[0].split(" ")[1], headers, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client, or the test, has ended
        finally:
            self._connections.discard(writer)
            writer.transport.abort()

    async def _answer(self, target: str, headers: Mapping[str, str], writer: asyncio.StreamWriter) -> None:
        try:
            resource, namespace, parameters = self._authorise(target, headers)
            if parameters.get("watch") == "1":
                await self._watch(resource, namespace, parameters, writer)
            else:
                _reply(writer, 200, {}, json.dumps(self._list(resource, namespace, parameters)).encode())
        except _Refused as refused:
            _reply(writer, refused.code, refused.headers, refused.body)
        await writer.drain()

    def _authorise(self, target: str, headers: Mapping[str, str]) -> tuple[str, str, dict[str, str]]:
        parts = urlsplit(target)
        parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
        token = headers.get("authorization", "").removeprefix("Bearer ")
        namespace, resource = "", ""
        for path, name in _PATHS.items():
            if match := re.fullmatch(path.format("([^/]+)"), parts.path):
                namespace, resource = match[1], name
        verb = "watch" if parameters.get("watch") == "1" else "list"
        self.calls.append(Call(verb, resource, parameters, token))
        if self.refuse is not None:
            code, more, body = self.refuse
            refused = _Refused(code, "", "")
            refused.headers, refused.body = more, body
            raise refused
        if token not in self.tokens:
            raise _Refused(401, "Unauthorized", "Unauthorized")
        if not resource:
            raise _Refused(404, "NotFound", "the server could not find the requested resource")
        if verb not in self.tokens[token]:
            plural, _, group = resource.partition(".")
            raise _Refused(
                403,
                "Forbidden",
                f'{resource} is forbidden: User "system:serviceaccount:{namespace}:dp-extproc" cannot {verb} resource '
                f'"{plural}" in API group "{group}" in the namespace "{namespace}"',
            )
        _selects(parameters.get("labelSelector", ""), {})  # a selector that cannot be read is refused
        return resource, namespace, parameters

    def _list(self, resource: str, namespace: str, parameters: Mapping[str, str]) -> Manifest:
        if int(parameters.get("resourceVersion") or 0) > self.version:
            raise _too_large(int(parameters["resourceVersion"]), self.version)
        start = 0
        if token := parameters.get("continue"):
            version, _, index = token.partition("/")
            if int(version) < self.oldest:
                raise _Refused(
                    410, "Expired", "The provided continue parameter is too old to display a consistent list"
                )
            start = int(index)
        found = [
            manifest
            for key, manifest in self._objects.items()
            if key[:2] == (resource, namespace) and _matches(parameters, manifest)
        ]
        limit = int(parameters.get("limit") or len(found) + 1)
        end = start + min(limit, self.largest_page or limit)
        more = {"continue": f"{self.version}/{end}", "remainingItemCount": len(found) - end} if end < len(found) else {}
        version, kind = _KINDS[resource]
        meta = {"resourceVersion": str(self.version), **more}
        return {"kind": f"{kind}List", "apiVersion": version, "metadata": meta, "items": found[start:end]}

    async def _watch(
        self, resource: str, namespace: str, parameters: Mapping[str, str], writer: asyncio.StreamWriter
    ) -> None:
        position = int(parameters["resourceVersion"])
        if position < self.oldest and self.gone_as_status:
            raise _gone(position, self.oldest)
        _head(writer, 200, {"Transfer-Encoding": "chunked"})
        if position < self.oldest:
            _event(writer, "ERROR", _gone(position, self.oldest).status)
            writer.write(b"0\r\n\r\n")
            return
        loop = asyncio.get_running_loop()
        end, sent, raw = loop.time() + float(parameters["timeoutSeconds"]), 0, len(self._raw)
        version, kind = _KINDS[resource]
        bookmark = {"kind": kind, "apiVersion": version}
        while (left := end - loop.time()) > 0:
            changed = self._changed
            for each in () if self.silent else self._history[sent:]:
                sent += 1
                if each.version > position and (each.resource, each.namespace) == (resource, namespace):
                    _change_event(writer, each, parameters)
            for piece in self._raw[raw:]:
                raw += 1
                _chunk(writer, piece)
            await writer.drain()
            try:
                await asyncio.wait_for(changed.wait(), min(left, self.bookmarks))
            except TimeoutError:
                if not self.silent and parameters.get("allowWatchBookmarks") == "true":
                    _event(writer, "BOOKMARK", bookmark | {"metadata": {"resourceVersion": str(self.version)}})
        writer.write(b"0\r\n\r\n")


def _matches(parameters: Mapping[str, str], manifest: Manifest) -> bool:
    meta, names = manifest["metadata"], parameters.get("fieldSelector", "")
    has_name = not names or names == f"metadata.name={meta['name']}"
    return has_name and _selects(parameters.get("labelSelector", ""), meta.get("labels") or {})


def _change_event(writer: asyncio.StreamWriter, change: _Change, parameters: Mapping[str, str]) -> None:
    """Send a change as it appears to a selector: an object whose labels do not match any more is deleted."""
    was, now = (manifest is not None and _matches(parameters, manifest) for manifest in (change.before, change.after))
    if now and change.after is not None:
        _event(writer, "MODIFIED" if was else "ADDED", change.after)
    elif was and change.before is not None:
        meta = change.before["metadata"] | {"resourceVersion": str(change.version)}
        _event(writer, "DELETED", change.before | {"metadata": meta})


def _gone(version: int, oldest: int) -> _Refused:
    return _Refused(410, "Expired", f"too old resource version: {version} ({oldest})")


def _too_large(version: int, current: int) -> _Refused:
    message = f"Timeout: Too large resource version: {version}, current: {current}"
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    return _Refused(504, "Timeout", message, causes=[cause], retryAfterSeconds=1)


def _selects(selector: str, labels: Mapping[str, str]) -> bool:
    """Match equality-based and set-based requirements."""
    for requirement in re.split(r",(?![^(]*\))", selector) if selector else []:
        if match := re.fullmatch(r"\s*([\w./-]+)\s+(in|notin)\s+\(([\w.,\s-]*)\)\s*", requirement):
            values = {each.strip() for each in match[3].split(",")}
            good = (labels.get(match[1]) in values) == (match[2] == "in")
        elif match := re.fullmatch(r"\s*([\w./-]+)\s*(==?|!=)\s*([\w.-]*)\s*", requirement):
            good = (labels.get(match[1]) == match[3]) == (match[2] != "!=")
        elif match := re.fullmatch(r"\s*(!?)\s*([\w./-]+)\s*", requirement):
            good = (match[2] in labels) != bool(match[1])
        else:
            raise _Refused(400, "BadRequest", f"unable to parse requirement: {requirement}")
        if not good:
            return False
    return True


def _head(writer: asyncio.StreamWriter, code: int, headers: Mapping[str, str]) -> None:
    lines = [f"HTTP/1.1 {code} X", "Content-Type: application/json", *(f"{key}: {headers[key]}" for key in headers)]
    writer.write("\r\n".join([*lines, "", ""]).encode())


def _reply(writer: asyncio.StreamWriter, code: int, headers: Mapping[str, str], body: bytes) -> None:
    _head(writer, code, {"Content-Length": str(len(body)), **headers})
    writer.write(body)


def _chunk(writer: asyncio.StreamWriter, piece: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))


def _event(writer: asyncio.StreamWriter, kind: str, manifest: Manifest) -> None:
    _chunk(writer, json.dumps({"type": kind, "object": manifest}).encode() + b"\n")


def endpoint_slice(name: str, service: str, *addresses: str, port: int = 30000, **conditions: bool) -> Manifest:
    """Write a slice of a Service with the port ``http``, in which all addresses have the same conditions."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv6" if addresses and ":" in addresses[0] else "IPv4",
        "endpoints": [
            {
                "addresses": [each],
                "conditions": {"ready": True} | conditions,
                "targetRef": {"kind": "Pod", "name": f"pod-{each}", "uid": f"uid-{each}"},
            }
            for each in addresses
        ],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}] if addresses else None,
    }


def pod(name: str, address: str, *, ready: bool = True, port: int = 30000, **meta: Any) -> Manifest:
    """Write a running pod with one container and the port ``http``; *meta* goes into its metadata."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "uid": f"uid-{name}", **meta},
        "spec": {"containers": [{"name": "engine", "ports": [{"name": "http", "containerPort": port}]}]},
        "status": {
            "phase": "Running",
            "podIP": address,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def inference_pool(name: str, labels: Mapping[str, str], *ports: int) -> Manifest:
    """Write an InferencePool."""
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": dict(labels)},
            "targetPorts": [{"number": port} for port in ports],
            "endpointPickerRef": {"name": "picker", "port": {"number": 9002}},
        },
    }
