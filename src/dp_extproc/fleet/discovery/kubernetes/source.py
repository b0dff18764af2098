"""A source of endpoints that reads EndpointSlices of Services, or pods, from a Kubernetes API server.

The pods may be those of an InferencePool. Then the InferencePool is watched too, and each change of what it selects
leads to another watch of pods.
"""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from dp_extproc.config.discovery import KubernetesSettings
from dp_extproc.engines.model import SourceKind
from dp_extproc.fleet.discovery.kubernetes.access import SERVICE_ACCOUNT, find_access
from dp_extproc.fleet.discovery.kubernetes.client import ApiClient, Resource, open_client
from dp_extproc.fleet.discovery.kubernetes.inference_pool import (
    GROUP,
    PLURAL,
    VERSION,
    Targets,
    read_pool,
    read_pool_pod,
)
from dp_extproc.fleet.discovery.kubernetes.labels import SERVICE_NAME
from dp_extproc.fleet.discovery.kubernetes.pods import read_pod
from dp_extproc.fleet.discovery.kubernetes.reflector import Readable, Reflector, Reports, Timing
from dp_extproc.fleet.discovery.kubernetes.reports import MemberReports
from dp_extproc.fleet.discovery.kubernetes.slices import read_slice
from dp_extproc.fleet.discovery.source import SourceListener

_T = TypeVar("_T", bound=Readable)


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
        elif settings.inference_pool:
            what = f"InferencePool {settings.inference_pool}"
        else:
            what = f"services {settings.selector}" if settings.selector else f"pods {settings.pods}"
        return f"kubernetes {what}" + (f" in {settings.namespace}" if settings.namespace else "")

    async def run(self, listener: SourceListener) -> None:
        """Report until cancelled."""
        settings, reports = self._settings, MemberReports(str(self), listener)
        if settings.inference_pool is not None:
            await self._follow_pool(settings.inference_pool, reports)
            return
        reader = read_pod if settings.pods else read_slice
        if settings.pods:
            resource = partial(_pods, settings.pods)
        else:
            resource = partial(_slices, settings.selector or f"{SERVICE_NAME}={settings.service}")
        read = partial(reader, port=settings.port, group_label=settings.group_label)
        await self._reflect(read, reports, resource)

    async def _follow_pool(self, name: str, reports: MemberReports) -> None:
        """Report the pods of an InferencePool, whatever it selects at the time."""
        changed = asyncio.Event()
        pool = PoolReports(name, reports, changed.set)
        pods: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reflect(read_pool, pool, partial(_pool, name)))
            while True:
                await changed.wait()
                changed.clear()
                if pods is not None:
                    pods.cancel()
                    await asyncio.wait((pods,))
                    reports.forget()
                targets = pool.targets
                pods = None if targets is None else tasks.create_task(self._reflect_pods(targets, reports))

    async def _reflect_pods(self, targets: Targets, reports: MemberReports) -> None:
        settings = self._settings
        read = partial(
            read_pool_pod,
            ports=targets.ports,
            group_label=settings.group_label,
            ranks_by_port=settings.ranks_by_port,
        )
        await self._reflect(read, reports, partial(_pods, targets.selector))

    async def _reflect(
        self, read: Callable[[msgspec.Raw], _T], reports: Reports[_T], resource: Callable[[str], Resource]
    ) -> None:
        reflector = Reflector(read, reports, clock=self._clock, rng=self._rng, timing=self._timing)
        await reflector.run(partial(self._connect, resource))

    @asynccontextmanager
    async def _connect(self, resource: Callable[[str], Resource]) -> AsyncIterator[ApiClient]:
        # In a thread: it reads files, and loads certificates, which takes up to 50 ms.
        access = await asyncio.to_thread(find_access, self._environment, self._account)
        wanted = resource(self._settings.namespace or access.namespace)
        async with open_client(access, wanted, self._timing.line_timeout) as client:
            yield client


class PoolReports:
    """Follows an InferencePool, and reports why there is nothing to follow."""

    def __init__(self, name: str, members: MemberReports, changed: Callable[[], object]) -> None:
        """Set up; *changed* is called when other pods are to be watched."""
        self._name = name
        self._members = members
        self._changed = changed
        self.targets: Targets | None = None
        """The pods to watch; None if they are unknown."""

    def objects(self, parts: Collection[Targets]) -> None:
        """Take the InferencePool, if it exists."""
        missing = f"there is no InferencePool {self._name}; create it, or correct the name and the namespace"
        found = next(iter(parts), Targets(problem=missing))
        if found.problem:
            self._members.failed(found.problem)
        targets = None if found.problem else found
        if targets != self.targets:
            self.targets = targets
            self._changed()
        elif targets is not None:
            self._members.repeat()  # the API server can be read again

    def failed(self, message: str) -> None:
        """Report why the InferencePool is unknown. Its pods are watched on."""
        self._members.failed(message)


def _pods(selector: str, namespace: str) -> Resource:
    return Resource("", "v1", "pods", selector, namespace)


def _slices(selector: str, namespace: str) -> Resource:
    return Resource("discovery.k8s.io", "v1", "endpointslices", selector, namespace)


def _pool(name: str, namespace: str) -> Resource:
    return Resource(GROUP, VERSION, PLURAL, "", namespace, name)
