"""Measure one scheduling decision of the service, from a small fleet to one of 4096 ranks.

A decision is everything between a parsed request and a body to be written: filters, endpoint and rank for both legs,
and reservations. Between decisions, requests are answered and end. Every engine is read once a second, which has 1000
decisions, so each decision finds what has changed.

Prints microseconds of CPU time: the median and the 99th percentile of single decisions. A busy machine makes them
longer, by its caches alone.
"""

import argparse
import gc
import statistics
import time
from itertools import count
from random import Random

from dp_extproc.config import HostPolicy, LoadSignal, PolicySettings
from dp_extproc.engines.model import Endpoint, EngineFacts, LoadPage, Mode, RankSample, Role, Version
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.records import RequestCost
from dp_extproc.load.tracker import InFlightTracker
from dp_extproc.request.routes import Api
from dp_extproc.scheduling.filters import EndpointFilter
from dp_extproc.scheduling.pairing import Pairing
from dp_extproc.scheduling.picker import Picker

_IN_FLIGHT = 6
"""Reserved requests per prefill rank."""
_RATE = 1000
"""Decisions per second."""


def make_fleet(engines: int, ranks: int) -> LoadCache:
    """Make so many endpoints of each role, with a sample of every rank."""
    endpoints = [
        Endpoint(f"http://10.{number >> 8}.{number & 255}.{index}:30000", "10.0.0.1", 30000, "*", role)
        for index, role in enumerate((Role.PREFILL, Role.DECODE))
        for number in range(engines)
    ]
    fleet = LoadCache(endpoints, stale_after=5.0)
    for endpoint in endpoints:
        mode = Mode.PREFILL if endpoint.role is Role.PREFILL else Mode.DECODE
        facts = EngineFacts(
            version=Version(0, 5, 23),
            dp_ranks=ranks,
            mode=mode,
            dp_attention=True,
            served_model="m",
            bootstrap_port=8998,
            load_balance_method=None,
            follows_rooms=mode is Mode.PREFILL,
            step_tokens=2048,
        )
        fleet.discovered(endpoint, endpoint.url, facts, 0.0)
        fleet.sampled(endpoint, make_page(fleet, endpoint), 0.0, 0.0)
    return fleet


def make_page(fleet: LoadCache, endpoint: Endpoint) -> LoadPage:
    """Make the load page of an engine with the service's own reservations, and external load on every fourth rank."""
    samples = []
    for rank in fleet.by_url[endpoint.url].ranks:
        others = rank.index % 4 == 0
        tokens = round(rank.reserved_tokens) + 1000 * others
        samples.append(
            RankSample(
                rank.index,
                tokens,
                total_tokens=tokens,
                waiting_uncached_tokens=tokens,
                running_requests=round(rank.reserved_requests) + others,
                tokens_per_second=50.0 * max(1, round(rank.reserved_requests)),
                capacity_tokens=1 << 22,
                age=0.0,
            )
        )
    return LoadPage(tuple(samples))


def measure(engines: int, ranks: int, host: HostPolicy, decisions: int) -> list[float]:
    """Schedule requests at a steady load, and time each one.

    Returns microseconds.
    """
    fleet = make_fleet(engines, ranks)
    rng = Random(1)
    picker = Picker(PolicySettings(host=host), LoadSignal.ESTIMATE, fleet.prefixes["*"], rng)
    filters, tracker = EndpointFilter(fleet), InFlightTracker(fleet)
    limit = engines * ranks * _IN_FLIGHT
    in_flight = []
    times = []
    reading = count()
    unread = 0.0
    gc.disable()
    for number in range(limit + decisions):
        now = number / _RATE
        unread += len(fleet.endpoints) / _RATE
        while unread >= 1:
            unread -= 1
            endpoint = fleet.endpoints[next(reading) % len(fleet.endpoints)]
            fleet.sampled(endpoint, make_page(fleet, endpoint), now, now)
        cost = RequestCost(float(rng.randint(200, 8000)))
        began = time.thread_time_ns()
        prefills = filters.capable("*", Role.PREFILL, Api.CHAT, now)
        decodes = filters.capable("*", Role.DECODE, Api.CHAT, now)
        targets = picker.pick(Pairing(prefills, decodes), cost, now)
        attempt = tracker.open(targets.prefill, targets.decode, cost, now)
        elapsed = time.thread_time_ns() - began
        in_flight.append(attempt)
        if number >= limit:
            times.append(elapsed / 1000)
            done = in_flight.pop(rng.randrange(len(in_flight) // 2))
            done.prefill_answered(200, now)
            done.end(now)
    gc.enable()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=3000)
    args = parser.parse_args()
    print(f"{'policy':16}{'engines':>16}{'ranks in all':>14}{'median us':>11}{'p99 us':>9}")
    for engines, ranks in ((2, 4), (8, 8), (256, 8), (64, 32), (8, 256)):
        for host in (HostPolicy.LOCKSTEP, HostPolicy.LEAST_TOKENS):
            times = sorted(measure(engines, ranks, host, args.decisions))
            shape = f"{engines}+{engines} of {ranks}"
            p99 = times[int(len(times) * 0.99)]
            print(f"{host:16}{shape:>16}{2 * engines * ranks:>14}{statistics.median(times):>11.1f}{p99:>9.1f}")


if __name__ == "__main__":
    main()
