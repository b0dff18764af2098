"""Prometheus metrics: counts of events, and values that are read from the load cache whenever Prometheus scrapes."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dp_extproc import __version__
from dp_extproc.attempt.listener import Decided, LegFailed
from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Role
from dp_extproc.load.autoscaling import Autoscaling
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import Freshness
from dp_extproc.observability.leg_metrics import Durations
from dp_extproc.sync.transport.replica import SyncStatus

_DECISION_BUCKETS: Final = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
"""Bounds in seconds. A decision on a small body takes tens of microseconds, on one of 64 MB tens of milliseconds."""

_SOURCE: Final = "polling"
"""Value of the label ``source``: the service polls the engines for their load. There is no other source yet."""


class Values(Collector):
    """The values of all metrics at one moment."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics

    def render(self) -> bytes:
        """Write the page for Prometheus, which takes 70 ms for 256 endpoints of 8 ranks."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)


class Telemetry:
    """Counts events of requests and engines, and collects all metrics of the process.

    Counts of requests are plain numbers: the instruments of the Prometheus client take locks, and would cost a tenth of
    the CPU time of the service.
    """

    def __init__(self, loads: LoadCache, clock: Callable[[], float]) -> None:
        self._loads = loads
        self._clock = clock
        self._failures: Counter[tuple[str, str]] = Counter()
        self._samples: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter(routed=0, answered=0)
        self._decisions = Durations(_DECISION_BUCKETS)
        self._streams = 0
        self._leg_failures: Counter[tuple[str, str, str]] = Counter()
        self._missing_legs = 0
        self._deadly_requests = 0
        self._destination_mismatches = 0
        self._held = Durations()
        self._held_in_vain = 0
        self._responses_skipped = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def add(self, collector: Collector) -> None:
        """Add the metrics of another component."""
        self._registry.register(collector)

    def page(self) -> bytes:
        return self.values().render()

    def values(self) -> "Values":
        """Collect the present values of all metrics. Only this has to be done in the event loop."""
        return Values(tuple(self._registry.collect()))

    def forget_all_but(self, urls: Collection[str]) -> None:
        """Forget the counts of endpoints that were removed."""
        self._samples = Counter({url: count for url, count in self._samples.items() if url in urls})
        self._failures = Counter({key: count for key, count in self._failures.items() if key[0] in urls})

    # --- attempts ---

    def attempt_opened(self) -> None:
        self._streams += 1

    def attempt_closed(self) -> None:
        self._streams -= 1

    def decided(self, decided: Decided) -> None:
        self._decisions.add(decided.seconds)
        self._outcomes[decided.outcome] += 1

    def leg_failed(self, failed: LegFailed) -> None:
        self._leg_failures[failed.leg.value, failed.reason.value, "yes" if failed.retried else "no"] += 1

    def leg_missing(self) -> None:
        self._missing_legs += 1

    def deadly_request(self) -> None:
        """Count a request that was found to end engines."""
        self._deadly_requests += 1

    def destination_mismatch(self) -> None:
        self._destination_mismatches += 1

    def held(self, seconds: float, *, in_vain: bool) -> None:
        self._held.add(seconds)
        self._held_in_vain += in_vain

    def responses_skipped(self) -> None:
        self._responses_skipped += 1

    # --- engines ---

    def discovered(self, endpoint: Endpoint, address: str, facts: EngineFacts, now: float) -> None:
        """Count nothing: the load cache has the facts of the engine."""

    def sampled(self, endpoint: Endpoint, page: LoadPage, started: float, now: float) -> None:  # noqa: ARG002 - the protocol's
        self._samples[endpoint.url] += 1

    def failed(self, endpoint: Endpoint, failure: EngineFailure, now: float) -> None:  # noqa: ARG002 - the protocol's
        self._failures[endpoint.url, failure.kind.value] += 1

    # --- called by prometheus_client at every scrape ---

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("dp_extproc_build", "Version of the service.", value={"version": __version__})
        yield from self._collect_requests()
        yield from self._collect_legs()
        yield from self._collect_endpoints()
        yield from self._collect_ranks()
        ratio = GaugeMetricFamily("dp_extproc_prompt_bytes_per_token", "Text bytes per prompt token.", labels=["pool"])
        for pool, estimate in self._loads.ratios.items():
            ratio.add_metric([pool], estimate.bytes_per_token)
        yield ratio

    def _collect_requests(self) -> Iterator[Metric]:
        yield _by_label(
            "dp_extproc_requests",
            "Requests decided: outcome is routed, answered (by the service itself), or the reason of a refusal.",
            "outcome",
            self._outcomes,
        )
        yield self._decisions.metric(
            "dp_extproc_decision_duration_seconds", "Work from the last byte of the request to the decision."
        )
        yield GaugeMetricFamily("dp_extproc_active_streams", "Requests and responses in flight.", value=self._streams)

    def _collect_legs(self) -> Iterator[Metric]:
        failures = CounterMetricFamily(
            "dp_extproc_leg_failures",
            "Failed attempts, by the leg that failed, and whether the request was scheduled again.",
            labels=["leg", "reason", "retried"],
        )
        for labels, count in self._leg_failures.items():
            failures.add_metric(labels, count)
        yield failures
        yield CounterMetricFamily(
            "dp_extproc_missing_prefill_legs",
            "Prefill legs whose stream did not arrive here.",
            value=self._missing_legs,
        )
        yield CounterMetricFamily(
            "dp_extproc_deadly_requests",
            "Requests that were found to end the engines that compute them, and are refused since.",
            value=self._deadly_requests,
        )
        yield CounterMetricFamily(
            "dp_extproc_destination_mismatches",
            "Requests that a gateway sent to another endpoint than the pick.",
            value=self._destination_mismatches,
        )
        yield self._held.metric("dp_extproc_held_seconds", "Time for which response headers were held.")
        yield CounterMetricFamily(
            "dp_extproc_hold_given_up",
            "Responses that went to the client before prefill had answered, because they could be held no longer.",
            value=self._held_in_vain,
        )
        yield CounterMetricFamily(
            "dp_extproc_gateway_without_responses",
            "Requests of a gateway that sends no response headers.",
            value=self._responses_skipped,
        )

    def _collect_endpoints(self) -> Iterator[Metric]:
        labels = ["pool", "role", "endpoint"]
        gauge, counter = partial(GaugeMetricFamily, labels=labels), partial(CounterMetricFamily, labels=labels)
        state = GaugeMetricFamily(
            "dp_extproc_endpoint_state",
            "1 for the present state: fresh, suspect, stale, unknown.",
            labels=[*labels, "state"],
        )
        age = gauge("dp_extproc_load_age_seconds", "Age of the last reading of the load.")
        samples = CounterMetricFamily("dp_extproc_load_updates", "Readings of the load.", labels=[*labels, "source"])
        failures = CounterMetricFamily(
            "dp_extproc_load_failures", "Readings that failed.", labels=[*labels, "source", "kind"]
        )
        cached = counter(
            "dp_extproc_cached_prompt_tokens", "Prompt tokens that were expected in the prefix cache of their rank."
        )
        expected = counter(
            "dp_extproc_expected_cached_tokens", "Cached tokens that the prefix index expected, of compared prompts."
        )
        found = counter("dp_extproc_found_cached_tokens", "Cached tokens that the engine counted in these prompts.")
        credited = gauge("dp_extproc_prefix_credit_ratio", "Share of the expected cached tokens that counts in picks.")
        expired = counter("dp_extproc_expired_reservations", "Reservations that expired because no event ended them.")
        ejected = gauge("dp_extproc_endpoint_ejected", "1 while the endpoint is ejected.")
        tpot = gauge(
            "dp_extproc_time_per_output_token_seconds", "Mean time per output token, as the engine reports it."
        )
        prompt_time = gauge(
            "dp_extproc_time_per_prompt_token_seconds",
            "Mean time of a rank per prompt token that is not cached, as the engine counts its steps.",
        )
        now = self._clock()
        kinds: dict[str, list[tuple[str, int]]] = {}
        for (url, kind), count in self._failures.items():
            kinds.setdefault(url, []).append((kind, count))
        for endpoint in self._loads.endpoints:
            names = [endpoint.pool, endpoint.role.value, endpoint.url]
            load = self._loads.by_url.get(endpoint.url)
            present = Freshness.UNKNOWN if load is None else load.freshness(now, self._loads.stale_after)
            for freshness in Freshness:
                state.add_metric([*names, freshness.name.lower()], float(freshness is present))
            if load is not None:
                if present is not Freshness.UNKNOWN:
                    age.add_metric(names, now - load.sampled_at)
                ejected.add_metric(names, float(load.health.is_ejected(now)))
                cached.add_metric(names, load.cached_prompt_tokens)
                expired.add_metric(names, load.expired)
                if load.role is not Role.DECODE:
                    expected.add_metric(names, load.prefix_truth.expected)
                    found.add_metric(names, load.prefix_truth.found)
                    credited.add_metric(names, load.prefix_truth.share(now))
                if (seconds := load.tpot) is not None:
                    tpot.add_metric(names, seconds)
                if (seconds := load.time_per_prompt_token) is not None:
                    prompt_time.add_metric(names, seconds)
            samples.add_metric([*names, _SOURCE], self._samples[endpoint.url])
            for kind, count in kinds.get(endpoint.url, ()):
                failures.add_metric([*names, _SOURCE, kind], count)
        yield from (state, age, ejected, samples, failures, cached, expired, tpot, prompt_time)
        yield from (expected, found, credited)

    def _collect_ranks(self) -> Iterator[Metric]:
        labels = ["pool", "role", "endpoint", "dp_rank"]
        gauge, counter = partial(GaugeMetricFamily, labels=labels), partial(CounterMetricFamily, labels=labels)
        picks = counter("dp_extproc_picks", "Requests for which this rank was picked.")
        reserved = gauge("dp_extproc_reserved_tokens", "Tokens of all reservations.")
        requests = gauge("dp_extproc_reserved_requests", "Requests with a reservation.")
        uncached = counter("dp_extproc_uncached_prompt_tokens", "Prompt tokens that the rank has to compute.")
        compared = gauge("dp_extproc_load_tokens", "The load that policies compare.")
        for load in self._loads.by_url.values():
            for rank in load.ranks:
                names = [load.pool, load.role.value, load.url, str(rank.index)]
                picks.add_metric(names, rank.picks)
                reserved.add_metric(names, rank.reserved_tokens)
                requests.add_metric(names, rank.reserved_requests)
                uncached.add_metric(names, rank.uncached_prompt_tokens)
                compared.add_metric(names, rank.tokens)
        yield from (picks, uncached, reserved, requests, compared)
        yield GaugeMetricFamily(
            "dp_extproc_reservations",
            "Reservations on all endpoints, draining ones included; zero when no request is in flight.",
            value=sum(load.reservations for load in (*self._loads.by_url.values(), *self._loads.draining)),
        )


class AutoscalingMetrics:
    """Collects the autoscaling signals of each pool and role."""

    def __init__(self, autoscaling: Autoscaling, clock: Callable[[], float]) -> None:
        self._autoscaling = autoscaling
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        gauge = partial(GaugeMetricFamily, labels=["pool", "role"])
        saturation = gauge("dp_extproc_saturation_ratio", "Share of the capacity that is taken, queues included.")
        wanted = gauge(
            "dp_extproc_wanted_endpoints", "Endpoints with which the target share would be taken; may be a fraction."
        )
        for signal in self._autoscaling.signals(self._clock()):
            saturation.add_metric([signal.pool, signal.role.value], signal.saturation)
            wanted.add_metric([signal.pool, signal.role.value], signal.wanted)
        yield from (saturation, wanted)


class SyncMetrics:
    """Collects the metrics of the exchange between replicas."""

    def __init__(self, status: Callable[[], SyncStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield GaugeMetricFamily("dp_extproc_sync_connected", "1 while the bus works.", value=status.connected)
        yield GaugeMetricFamily("dp_extproc_sync_peers", "Other replicas that publish.", value=len(status.peers))
        yield GaugeMetricFamily(
            "dp_extproc_sync_peer_requests",
            "Requests of other replicas with reservations here.",
            value=sum(peer.requests for peer in status.peers),
        )
        messages = {"sent": status.sent, "received": status.received, "lost": status.lost}
        yield _by_label("dp_extproc_sync_messages", "Messages between replicas.", "kind", messages)
        yield _by_label("dp_extproc_sync_anomalies", "Irregularities of the bus, by kind.", "kind", status.anomalies)


def _by_label(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    counter = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        counter.add_metric([value], count)
    return counter
