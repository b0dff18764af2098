"""The components of a process that schedules requests: built from a configuration, and changed by a reload."""

import asyncio
import contextlib
import logging
import secrets
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from random import Random
from typing import Any, Final

from grpc_health.v1.health import aio

from dp_extproc.attempt.failures import RetryBudget
from dp_extproc.attempt.gateways import BundledEnvoy, EndpointPicker
from dp_extproc.background import Guard
from dp_extproc.config import Config, Problem, Protocol, RetrySettings, Supervise
from dp_extproc.config.load import LoadSettings
from dp_extproc.engines.credentials import Credentials
from dp_extproc.engines.model import Endpoint, SourceKind
from dp_extproc.extproc.direct_leg import DirectLegs
from dp_extproc.extproc.service import ExtProcService
from dp_extproc.fleet.discovery.log import DiscoveryLog
from dp_extproc.fleet.discovery.roster import Change
from dp_extproc.fleet.discovery.runner import Discovery
from dp_extproc.fleet.discovery.sources import role_sources
from dp_extproc.fleet.monitor import FleetMonitor
from dp_extproc.load.autoscaling import Autoscaling
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import StepCosts
from dp_extproc.load.in_flight import NO_LISTENER, nothing
from dp_extproc.load.records import NO_WORK
from dp_extproc.observability.discovery_metrics import DiscoveryMetrics
from dp_extproc.observability.groups import GroupMetrics, Weights, describe_excluded_pairs, describe_groups
from dp_extproc.observability.leg_metrics import SentLegMetrics
from dp_extproc.observability.loads_page import describe_loads, describe_signals, describe_sources, describe_sync
from dp_extproc.observability.log import EngineLog
from dp_extproc.observability.metrics import AutoscalingMetrics, SyncMetrics, Telemetry
from dp_extproc.observability.pool_metrics import PoolMetrics, gateway_names
from dp_extproc.observability.suspect_log import SuspectLog
from dp_extproc.runtime.engine_tls import FollowedTls
from dp_extproc.runtime.readiness import Readiness, can_serve
from dp_extproc.runtime.secrets import read_api_keys
from dp_extproc.scheduling.admission import AdmissionQueue
from dp_extproc.scheduling.deadly import KEPT_SECONDS, DeadlyRequest, DeadlyRequests
from dp_extproc.scheduling.deaths import EngineDeaths
from dp_extproc.scheduling.encoder import LegSettings
from dp_extproc.scheduling.scheduler import Scheduler
from dp_extproc.sync.messages import AnyNotice, EngineLost, Notice, RequestAborted
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.transport.replica import Replica, join

_FIRST_ROUND_SECONDS: Final = 2.0
"""Longest time in seconds that the start waits for the first report of every source and a reading of every engine."""
_SECRETS_SECONDS: Final = 1.0
"""Seconds between two readings of the files with API keys and certificates."""
_TOKEN_BYTES: Final = 12
"""Bytes of a leg token, which clients must not guess."""

_log = logging.getLogger(__name__)


class Components:
    """The connected components, which are also the pages of the admin port.

    They do nothing before :meth:`tasks` run, and listen on no port.
    """

    def __init__(
        self,
        config: Config,
        health: aio.HealthServicer,
        *,
        owner: str,
        clock: Callable[[], float],
        rng: Random,
        guard: Guard,
    ) -> None:
        """Build and connect the components.

        The gRPC service *health* follows readiness. *owner* is the ``IP:port`` at which Envoy reaches this process.
        *clock* returns monotonic seconds, and *rng* has another seed in every process.
        """
        self.config = config
        self._clock = clock
        self._credentials = Credentials(read_api_keys(config).by_pool)
        self._tls = None if config.engine_tls is None else FollowedTls(config.engine_tls)
        if self._tls is not None:
            self._tls.renew()
        costs = StepCosts(config.load.prefill_step_cost_tokens, config.load.decode_request_cost_tokens)
        self._queue = None if config.queue is None else AdmissionQueue(config.queue)
        made_room = nothing if self._queue is None else self._queue.notify
        self._loads = LoadCache(
            (),
            config.load.stale_after,
            costs,
            config.outlier_detection,
            made_room,
            pools=[pool.name for pool in config.pools],
        )
        self._discovery_log = DiscoveryLog(lambda: [load.configured for load in self._loads.draining])
        self._discovery = Discovery(
            role_sources(config),
            changed=self._changed,
            reviewed=self._discovery_log.review,
            takes_requests=lambda endpoint: self._loads.takes(endpoint, clock()),
            clock=clock,
            guard=guard,
        )
        endpoints = self._discovery.endpoints
        self._loads.update(endpoints, config.load.stale_after, [pool.name for pool in config.pools])
        self.telemetry = Telemetry(self._loads, clock)
        self.telemetry.add(guard)
        self.telemetry.add(DiscoveryMetrics(self._loads, self._discovery.roster, clock))
        waiting = (lambda _pool: NO_WORK) if self._queue is None else self._queue.waiting
        self._autoscaling = Autoscaling(
            self._loads,
            config.autoscaling,
            waiting,
            has_all_arrivals=lambda: self._replica is None or self._replica.status().connected,
        )
        self.telemetry.add(AutoscalingMetrics(self._autoscaling, clock))
        self.readiness = Readiness(health, lambda: any(can_serve(pool, self._loads) for pool in self.config.pools))
        self._engine_log = EngineLog()
        self._suspect_log = SuspectLog(self._loads)
        is_picker = config.protocol is Protocol.ENDPOINT_PICKER
        outbox = Outbox(f"{rng.getrandbits(64):016x}")
        publish: Callable[[Notice], object] = _drop if config.sync is None else outbox.publish
        self._deadly = DeadlyRequests(
            self._found_deadly,
            lambda fingerprint, address, now: publish(EngineLost(now, fingerprint, address)),
            check_seconds=_death_shows_within(config.load),
        )
        self._monitor = FleetMonitor(
            endpoints,
            config.load,
            (
                self._loads,
                EngineDeaths(self._loads, self._deadly),
                self.telemetry,
                self._engine_log,
                self._suspect_log,
                self._discovery_log,
                self._discovery,
                self.readiness,
            ),
            clock=clock,
            rng=rng,
            guard=guard,
            credentials=self._credentials,
            tls=self.tls,
        )
        self._scheduler = Scheduler(
            config.pools,
            self._loads,
            owner=owner,
            rng=rng,
            draw_token=partial(secrets.token_hex, _TOKEN_BYTES),
            clock=clock,
            signal=config.load.signal,
            listener=NO_LISTENER if config.sync is None else outbox,
            admission=config.admission,
            queue=self._queue,
            legs=LegSettings(
                sends_prefill=config.sends_legs,
                reports_first_events=not is_picker and config.supervision.mode is Supervise.FIRST_EVENT,
                fallbacks=config.picker.fallbacks if is_picker else 0,
            ),
            credentials=self._credentials,
            watch=self._monitor,
            deadly=self._deadly,
        )
        self.telemetry.add(GroupMetrics(self._loads, self._weights, lambda: self._scheduler.group_requests))
        self._replica: Replica | None = None
        if config.sync is not None:
            self._replica = join(config.sync, outbox, self._scheduler.tracker.open_peer, heed=self._heed, clock=clock)
            self.telemetry.add(SyncMetrics(self._replica.status))
        if is_picker:
            self.telemetry.add(PoolMetrics(self._loads, gateway_names(config.pools), clock))
        sent_legs = SentLegMetrics(sends_legs=config.sends_legs)
        self.telemetry.add(sent_legs)
        self.service = ExtProcService(
            self._scheduler,
            (self.telemetry,),
            gateway=(
                EndpointPicker(config.envoy.session_header, hold=config.picker.hold) if is_picker else BundledEnvoy()
            ),
            supervision=config.supervision,
            budget=RetryBudget(RetrySettings(attempts=1) if is_picker else config.retry),
            queue=self._queue,
            max_body=config.envoy.max_body_bytes,
            clock=clock,
            announce_abort=lambda key: publish(RequestAborted(clock(), key)),
            legs=DirectLegs(
                config.supervision.longest_prefill,
                tls=self.tls,
                listener=sent_legs.legs,
                abort_listener=sent_legs.aborts,
            ),
        )

    async def first_round(self) -> None:
        """Wait until each source has reported and each engine was read, or has failed, for a limited time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_ROUND_SECONDS):
                await self._first_round()

    async def _first_round(self) -> None:
        await self._discovery.first_reports.wait()
        await self._monitor.first_round.wait()

    async def metrics(self) -> bytes:
        return await asyncio.to_thread(self.telemetry.values().render)

    async def ready(self) -> bool:
        return self.readiness.ready

    async def loads(self) -> dict[str, Any]:
        sync = None if self._replica is None else describe_sync(self._replica.status())
        now = self._clock()
        return {
            **describe_loads(self._loads, now),
            "groups": describe_groups(self._loads, self._weights()),
            "excluded_pairs": describe_excluded_pairs(self._loads),
            "autoscaling": describe_signals(self._autoscaling.signals(now)),
            "sources": describe_sources(self._discovery.roster, now),
            "sync": sync,
        }

    def _weights(self) -> Weights:
        return {pool.name: pool.groups.weights for pool in self.config.pools}

    def apply(self, config: Config) -> None:
        """Apply another configuration, which differs in no setting that needs a restart (see :mod:`.reload`)."""
        before = _static(self._discovery.endpoints)
        change = self._discovery.update(role_sources(config))
        self._discovery_log.change(change)
        self.config = config
        self._renew_keys()
        self._use(change.endpoints)
        self._deadly.check_seconds = _death_shows_within(config.load)
        self._scheduler.configure(config.pools, config.load.signal, config.admission)
        self._autoscaling.settings = config.autoscaling
        after = _static(change.endpoints)
        for word, changed in (("new", after - before), ("gone", before - after)):
            if changed:
                _log.info("configuration: %s: %s", word, ", ".join(sorted(each.url for each in changed)))

    def _heed(self, notice: AnyNotice, at: float) -> None:
        """Hand a notice of another replica to the component that it concerns."""
        match notice:
            case EngineLost():
                self._deadly.heed(notice.fingerprint, notice.address, at)
            case RequestAborted():
                self.service.abort(notice.key)

    def _found_deadly(self, request: DeadlyRequest) -> None:
        self.telemetry.deadly_request()
        _log.error(
            "a request has ended the engines at %s; it is refused for %g s; the hash of it: %s, its body: %d bytes",
            " and ".join(request.addresses),
            KEPT_SECONDS,
            request.fingerprint,
            request.body_bytes,
        )

    def _changed(self, change: Change) -> None:
        self._discovery_log.change(change)
        self._use(change.endpoints)

    def _use(self, endpoints: tuple[Endpoint, ...]) -> None:
        """Hand other endpoints, or endpoints with other settings, to all components."""
        self._loads.update(endpoints, self.config.load.stale_after, [pool.name for pool in self.config.pools])
        self._monitor.update(endpoints, self.config.load)
        self._engine_log.forget_all_but(endpoints)
        self._suspect_log.forget_all_but(endpoints)
        self._scheduler.forget_all_but(endpoints)
        self.readiness.review()
        self.telemetry.forget_all_but({each.url for each in endpoints})
        if self._queue is not None:
            self._queue.notify()

    def tasks(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """Return the background tasks by name."""
        tasks = {
            "sources": self._discovery.run,
            "scraper": self._monitor.run,
            "sweep": self.service.sweep,
            "readiness": self.readiness.run,
            "secrets": self._follow_secrets,
        }
        return tasks if self._replica is None else {**tasks, "sync": partial(self._exchange, self._replica)}

    async def _exchange(self, replica: Replica) -> None:
        """Join the other replicas after the first round, as requests on undiscovered endpoints would be ignored."""
        await self._first_round()
        await replica.run()

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The context of every connection to an engine; None without ``engine_tls``."""
        return None if self._tls is None else self._tls.context

    async def _follow_secrets(self) -> None:
        """Read changed API keys and certificates from their files. Files that cannot be used change nothing."""
        logged: list[str] = []
        while True:
            await asyncio.sleep(_SECRETS_SECONDS)
            lines: list[str] = []
            if any(pool.api_key is not None and pool.api_key.file for pool in self.config.pools):
                lines += [f"{each}; the key that was there before stays in use" for each in self._renew_keys()]
            if self._tls is not None:
                problems = await asyncio.to_thread(self._tls.renew)
                lines += [f"{each}; the certificates that were there before stay in use" for each in problems]
            for line in lines if lines != logged else ():
                _log.error("%s", line)
            logged = lines

    def _renew_keys(self) -> tuple[Problem, ...]:
        keys = read_api_keys(self.config)
        if not keys.problems:
            self._credentials.update(keys.by_pool)
        return keys.problems


def _drop(_notice: Notice) -> None:
    """Publish a notice to no other replica, as there is none."""


def _death_shows_within(settings: LoadSettings) -> float:
    """Return the seconds in which readings of an engine show whether it has died.

    Usually the first reading does. The rest is for a process without time for readings.
    """
    return 2 * (settings.interval + settings.timeout) + 10.0


def _static(endpoints: Iterable[Endpoint]) -> set[Endpoint]:
    """Return the endpoints that are in the configuration itself."""
    return {endpoint for endpoint in endpoints if endpoint.source is SourceKind.STATIC}
