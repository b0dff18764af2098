"""A source of endpoints that reads EndpointSlices of Services, or pods, from a Kubernetes API server."""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from dp_extproc.config.discovery import KubernetesSettings
from dp_extproc.engines.model import SourceKind
from dp_extproc.fleet.discovery.kubernetes.access import SERVICE_ACCOUNT, Access, find_access
from dp_extproc.fleet.discovery.kubernetes.client import ApiClient, Resource, open_client
from dp_extproc.fleet.discovery.kubernetes.labels import SERVICE_NAME
from dp_extproc.fleet.discovery.kubernetes.pods import read_pod
from dp_extproc.fleet.discovery.kubernetes.reflector import Reflector, Timing
from dp_extproc.fleet.discovery.kubernetes.slices import read_slice
from dp_extproc.fleet.discovery.source import SourceListener


class KubernetesSource:
    """The endpoints of one role, from Kubernetes."""

    def __init__(
        self,
        settings: KubernetesSettings,
        *,
        environment: Mapping[str, str] = os.environ,
        account: Path = SERVICE_ACCOUNT,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        timing: Timing | None = None,
    ) -> None:
        """Set up; nothing is read before :meth:`run`."""
        self._settings = settings
        self._environment = environment
        self._account = account
        self._clock = clock
        self._rng = rng or random.Random()
        self._timing = timing or Timing()

    @property
    def kind(self) -> SourceKind:
        return SourceKind.KUBERNETES

    @property
    def keep_for(self) -> float:
        return self._settings.keep_for

    def __str__(self) -> str:
        settings = self._settings
        if settings.service:
            what = f"service {settings.service}"
        else:
            what = f"services {settings.selector}" if settings.selector else f"pods {settings.pods}"
        return f"kubernetes {what}" + (f" in {settings.namespace}" if settings.namespace else "")

    async def run(self, listener: SourceListener) -> None:
        """Report until cancelled."""
        settings = self._settings
        reader = read_pod if settings.pods else read_slice
        read = partial(reader, port=settings.port, group_label=settings.group_label)
        reflector = Reflector(str(self), read, listener, clock=self._clock, rng=self._rng, timing=self._timing)
        await reflector.run(self._connect)

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[ApiClient]:
        # In a thread: it reads files, and loads certificates, which takes up to 50 ms.
        access = await asyncio.to_thread(find_access, self._environment, self._account)
        async with open_client(access, self._resource(access), self._timing.line_timeout) as client:
            yield client

    def _resource(self, access: Access) -> Resource:
        settings = self._settings
        namespace = settings.namespace or access.namespace
        if settings.pods:
            return Resource("", "v1", "pods", settings.pods, namespace)
        selector = settings.selector or f"{SERVICE_NAME}={settings.service}"
        return Resource("discovery.k8s.io", "v1", "endpointslices", selector, namespace)
