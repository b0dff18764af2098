"""Everything of one process that places requests, put together from a configuration, and changed by another one."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from random import Random
from typing import Any, Final

from dp_extproc.background import Guard
from dp_extproc.config import Config, Protocol, RetrySettings, Supervise
from dp_extproc.engines.credentials import Credentials
from dp_extproc.extproc.retries import RetryBudget
from dp_extproc.extproc.service import ExtProcService
from dp_extproc.fleet.discovery.static import endpoints_of
from dp_extproc.fleet.monitor import FleetMonitor
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import StepCosts
from dp_extproc.load.in_flight import NO_LISTENER, nothing
from dp_extproc.observability.log import EngineLog
from dp_extproc.observability.metrics import SyncMetrics, Telemetry
from dp_extproc.observability.pages import describe_loads, describe_sync
from dp_extproc.runtime.readiness import can_serve
from dp_extproc.runtime.secrets import read_api_keys
from dp_extproc.scheduling.admission import AdmissionQueue
from dp_extproc.scheduling.scheduler import Scheduler
from dp_extproc.sync.outbox import Outbox
from dp_extproc.sync.transport.replica import Replica, join

_LOOK_AROUND_SECONDS: Final = 2.0
_KEYS_SECONDS: Final = 1.0
"""Between two looks whether API keys have been replaced."""

_TOKEN_BYTES: Final = 12

_log = logging.getLogger(__name__)


class Components:
    """The parts, wired. Nothing runs before :meth:`tasks` do, and nothing is listened on."""

    def __init__(self, config: Config, *, owner: str, clock: Callable[[], float], rng: Random, guard: Guard) -> None:
        """Put it together.

        Args:
            config: Of this very process.
            owner: ``IP:port`` where Envoy reaches it.
            clock: Monotonic seconds.
            rng: Seeded differently in every process.
            guard: Over all that runs in the background.
        """
        self.config = config
        self._clock = clock
        endpoints = endpoints_of(config)
        self._credentials = Credentials(read_api_keys(config).by_pool)
        costs = StepCosts(config.load.prefill_step_cost_tokens, config.load.decode_request_cost_tokens)
        self._queue = None if config.queue is None else AdmissionQueue(config.queue)
        woken = nothing if self._queue is None else self._queue.notify
        self._fleet = LoadCache(endpoints, config.load.stale_after, costs, config.outlier_detection, woken)
        self.telemetry = Telemetry(self._fleet, clock)
        self.telemetry.add(guard)
        outbox = Outbox(f"{rng.getrandbits(64):016x}")
        self._dispatcher = Scheduler(
            config.pools,
            self._fleet,
            owner=owner,
            rng=rng,
            draw_token=partial(secrets.token_hex, _TOKEN_BYTES),
            clock=clock,
            signal=config.load.signal,
            observer=NO_LISTENER if config.sync is None else outbox,
            admission=config.admission,
            queue=self._queue,
            sees_first_events=config.supervision.mode is Supervise.FIRST_EVENT,
            credentials=self._credentials,
        )
        self._replica: Replica | None = None
        if config.sync is not None:
            self._replica = join(config.sync, outbox, self._dispatcher.ledger.open_peer, clock=clock)
            self.telemetry.add(SyncMetrics(self._replica.status))
        picks = config.protocol is Protocol.ENDPOINT_PICKER
        self.service = ExtProcService(
            self._dispatcher,
            self.telemetry,
            supervision=config.supervision,
            budget=RetryBudget(RetrySettings(attempts=1) if picks else config.retry),
            queue=self._queue,
            max_body=config.envoy.max_body_bytes,
            clock=clock,
            picks=picks,
            session_header=config.envoy.session_header,
        )
        self._engine_log = EngineLog()
        self._monitor = FleetMonitor(
            endpoints,
            config.load,
            (self._fleet, self.telemetry, self._engine_log),
            clock=clock,
            rng=rng,
            guard=guard,
            credentials=self._credentials,
        )

    async def look_around(self) -> None:
        """Wait until every engine has been tried once, but not for one that hangs."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._monitor.first_round.wait(), _LOOK_AROUND_SECONDS)

    def can_serve(self) -> bool:
        """Tell whether some pool has servers for every role that it needs."""
        return any(can_serve(pool, self._fleet, self._clock()) for pool in self.config.pools)

    def loads(self) -> dict[str, Any]:
        """Describe the books for /loads."""
        sync = None if self._replica is None else describe_sync(self._replica.status())
        return {**describe_loads(self._fleet, self._clock()), "sync": sync}

    def apply(self, config: Config) -> None:
        """Go on by another configuration, which differs in nothing that must not change; see :mod:`.reload`."""
        before, endpoints = set(endpoints_of(self.config)), endpoints_of(config)
        self.config = config
        self._renew_keys()
        self._fleet.update(endpoints, config.load.stale_after)
        self._dispatcher.configure(config.pools, config.load.signal, config.admission)
        self._monitor.update(endpoints, config.load)
        self._engine_log.forget_all_but(endpoints)
        self.telemetry.forget_all_but({each.url for each in endpoints})
        if self._queue is not None:
            self._queue.notify()
        for word, some in (("new", set(endpoints) - before), ("gone", before - set(endpoints))):
            if some:
                _log.info("configuration: %s: %s", word, ", ".join(sorted(each.url for each in some)))

    def tasks(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """Give what has to run all the time, by name."""
        tasks = {"scraper": self._monitor.run, "sweep": self.service.sweep, "api_keys": self._keep_keys}
        return tasks if self._replica is None else {**tasks, "sync": partial(self._take_part, self._replica)}

    async def _take_part(self, replica: Replica) -> None:
        """Join the other replicas once every engine was tried: what they tell of unknown ones would be left out."""
        await self._monitor.first_round.wait()
        await replica.run()

    async def _keep_keys(self) -> None:
        """Take new API keys from their files soon after they are there; a file that is unreadable changes nothing."""
        said: tuple[object, ...] = ()
        while True:
            await asyncio.sleep(_KEYS_SECONDS)
            if any(pool.api_key is not None and pool.api_key.file for pool in self.config.pools):
                problems = self._renew_keys()
                if problems != said:
                    said = problems
                    for problem in problems:
                        _log.error("%s; the key that was there before stays in use", problem)

    def _renew_keys(self) -> tuple[object, ...]:
        keys = read_api_keys(self.config)
        if not keys.problems:
            self._credentials.update(keys.by_pool)
        return keys.problems
