"""Records what a source and the API server send to each other, as lines of JSON; a test plays them back without Go."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from dp_extproc.fleet.discovery.kubernetes.client import ApiClient, Resource
from dp_extproc.fleet.discovery.kubernetes.objects import Event, Page
from dp_extproc.fleet.discovery.kubernetes.source import KubernetesSource


class Recording:
    """A file with one line for each request, page and event."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, **line: Any) -> None:
        for each in (*line.get("page", {}).get("items", ()), line.get("event", {}).get("object", {})):
            each.get("metadata", {}).pop("managedFields", None)  # most of an object, and of no interest
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class _RecordedClient:
    """An API client whose requests and answers are recorded."""

    def __init__(self, client: ApiClient, recording: Recording) -> None:
        self._client = client
        self._recording = recording
        decode = client._decode  # noqa: SLF001 - the only place with the lines as they come

        def recorded(lines: list[bytes], events: list[Event]) -> Any:
            for line in lines:
                if line.strip():
                    recording.add(event=json.loads(line))
            return decode(lines, events)

        client._decode = recorded  # type: ignore[method-assign] # noqa: SLF001 - as above

    async def page(self, parameters: dict[str, str]) -> Page:
        self._recording.add(list=parameters)
        page = await self._client.page(parameters)
        self._recording.add(page=json.loads(msgspec.json.encode(page)))
        return page

    async def events(self, parameters: dict[str, str]) -> AsyncGenerator[list[Event]]:
        self._recording.add(watch=parameters)
        async for events in self._client.events(parameters):
            yield events
        self._recording.add(end=True)


class RecordingSource(KubernetesSource):
    """A source whose conversation with the API server is recorded."""

    recording: Recording

    @asynccontextmanager
    async def _connect(self, resource: Callable[[str], Resource]) -> AsyncIterator[ApiClient]:
        async with super()._connect(resource) as client:
            yield _RecordedClient(client, self.recording)  # type: ignore[misc] # has the methods that are used
