"""The state of every endpoint in one word, for /loads and the metrics. Pure.

The states, of which the first that applies counts:

- ``draining``: it is no endpoint any more, and has requests in flight.
- ``joining``: its engine has not been found to be ready yet, or its first load page was not read yet.
- ``not_ready``: its engine, or its source, reports that it takes no requests.
- ``suspect``: its load page answers, but its scheduler stands still.
- ``stale``: its last sample is too old, or its engine is gone.
- ``ready``: it gets requests.
"""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from dp_extproc.engines.model import Endpoint
from dp_extproc.fleet.discovery.roster import Roster
from dp_extproc.load.cache import LoadCache
from dp_extproc.load.endpoint import EndpointLoad, Freshness


class EndpointState(StrEnum):
    """Whether an endpoint gets requests."""

    JOINING = "joining"
    READY = "ready"
    NOT_READY = "not_ready"
    SUSPECT = "suspect"
    STALE = "stale"
    DRAINING = "draining"


_STATES: Final = {
    Freshness.FRESH: EndpointState.READY,
    Freshness.SUSPECT: EndpointState.SUSPECT,
    Freshness.STALE: EndpointState.STALE,
}


def state_of(load: EndpointLoad | None, now: float, stale_after: float) -> EndpointState:
    """Return the state of an endpoint that is present; None stands for the load of one that was never discovered."""
    freshness = Freshness.UNKNOWN if load is None else load.freshness(now, stale_after)
    if load is None or freshness is Freshness.UNKNOWN:
        return EndpointState.JOINING
    if not load.is_ready:
        return EndpointState.NOT_READY
    return _STATES[freshness]


def count_states(loads: LoadCache, roster: Roster, now: float) -> dict[tuple[str, str, str, EndpointState], int]:
    """Count the endpoints by pool, role, kind of source, and state. Every state of a configured source has a count."""
    counts = Counter[tuple[str, str, str, EndpointState]]()
    for pool, role, source in sorted(_places(roster, loads.endpoints)):
        counts.update({(pool, role, source, state): 0 for state in EndpointState})
    for endpoint in loads.endpoints:
        state = state_of(loads.by_url.get(endpoint.url), now, loads.stale_after)
        counts[endpoint.pool, endpoint.role.value, endpoint.source.value, state] += 1
    for (pool, role, kind), count in roster.not_ready.items():
        counts[pool, role.value, kind.value, EndpointState.NOT_READY] += count
    for load in loads.draining:
        endpoint = load.configured
        counts[endpoint.pool, endpoint.role.value, endpoint.source.value, EndpointState.DRAINING] += 1
    return counts


def _places(roster: Roster, endpoints: Iterable[Endpoint]) -> set[tuple[str, str, str]]:
    configured = {(each.place.pool, each.place.role.value, each.kind.value) for each in roster.sources.values()}
    return configured | {(each.pool, each.role.value, each.source.value) for each in endpoints}
