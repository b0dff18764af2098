"""Rules for the routes into the block: what the printed route has, another gateway's route needs too."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Final

from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.route.v3 import RetryPolicy

from dp_extproc.contract import FAILED, RETRY, UNTRUSTED_NAMES, UNTRUSTED_PREFIXES
from dp_extproc.envoy_check.block import compare, low_breakers
from dp_extproc.envoy_check.bodies import bodies, body_limit
from dp_extproc.envoy_check.facts import Facts
from dp_extproc.envoy_check.findings import Finding, finding
from dp_extproc.envoy_check.messages import unpack
from dp_extproc.envoy_check.mutations import (
    removed_from_requests,
    removed_from_responses,
    removes_name,
    removes_prefix,
)
from dp_extproc.envoy_check.timing import timing
from dp_extproc.envoy_check.ways import Way, ways_to
from dp_extproc.envoy_config.listeners import buffer_bytes

_BY_STATUS: Final = frozenset({"5xx", "gateway-error", "retriable-status-codes"})
"""Conditions of Envoy that match the statuses of a failed attempt, and those of final refusals too."""
_WITH_RESET: Final = frozenset({"reset", "5xx"})
"""Conditions of Envoy that repeat a request which the next hop dropped without a response."""


def entrance(facts: Facts) -> Iterator[Finding]:
    """Look at every route into the block, and at the clusters on the way."""
    found = False
    used: set[str] = set()
    for way in ways_to(
        facts.snapshot,
        {facts.names.dispatch, *facts.entrances},
        facts.skip,
        inside=[each.name for each in facts.block.listeners],
    ):
        found = True
        used |= way.clusters & set(facts.entrances)
        yield from _retries(facts, way)
        yield from _headers(way)
        yield from timing(way)
        yield from bodies(way, facts.config.envoy.max_body_bytes, facts.snapshot.version)
    if not found:
        yield finding("no_entrance", "routes", entrance=facts.names.dispatch)
    for name in sorted(used - {facts.names.dispatch}):
        if (cluster := facts.cluster(name)) is not None:
            yield from _substitute(facts, cluster)


def _substitute(facts: Facts, found: Cluster) -> Iterator[Finding]:
    """Compare a cluster of another name with the printed one that it stands for."""
    place = f"cluster {found.name}"
    printed = next(each for each in facts.block.clusters if each.name == facts.names.dispatch)
    yield from compare(place, printed, found, ("name", "type", "load_assignment", "eds_cluster_config"))
    yield from low_breakers(place, found)
    if found.outlier_detection is not None:
        yield finding("outlier_detection", place)


def _retries(facts: Facts, way: Way) -> Iterator[Finding]:
    wanted = facts.config.retry.attempts - 1
    if wanted < 1:
        return
    policy = _retry_policy(way)
    if policy is None:
        yield finding("retry_policy_missing", way.place)
        return
    conditions = {each.strip() for each in policy.retry_on.split(",")}
    by_header = "retriable-headers" in conditions and any(each.name == RETRY for each in policy.retriable_headers)
    if not by_header:
        code = "retry_policy_ineffective" if conditions.isdisjoint(_BY_STATUS) else "retry_by_status"
        yield finding(code, way.place, found=policy.retry_on or "empty", header=RETRY)
    elif conditions.isdisjoint(_WITH_RESET):
        yield finding("retry_without_reset", way.place)
    retries = 1 if policy.num_retries is None else policy.num_retries
    if retries < wanted:
        yield finding("too_few_retries", way.place, found=retries, wanted=wanted)
    for field in ("per_try_timeout", "per_try_idle_timeout"):
        limit: timedelta | None = getattr(policy, field)
        if limit:
            yield finding("per_try_timeout", way.place, seconds=limit.total_seconds(), field=field)
    if (limit_bytes := body_limit(way)) < (needed := buffer_bytes(facts.config.envoy)):
        yield finding("buffer_limit", way.place, found=limit_bytes, wanted=needed)


def _retry_policy(way: Way) -> RetryPolicy | None:
    for part in (way.route.route, way.host):
        if part is not None and part.retry_policy is not None:
            return part.retry_policy
        if part is not None and isinstance(packed := unpack(part.retry_policy_typed_config), RetryPolicy):
            return packed
    return None


def _headers(way: Way) -> Iterator[Finding]:
    by_filters = removed_from_responses(way)
    by_routes = [name.lower() for part in (way.route, way.host, way.table) for name in part.response_headers_to_remove]
    if kept := [name for name in (RETRY, FAILED) if name not in by_routes and not removes_name(by_filters, name)]:
        yield finding("response_headers_kept", way.place, headers=_listed(kept))
    mutations = removed_from_requests(way)
    untrusted = [f"{prefix}*" for prefix in UNTRUSTED_PREFIXES if not removes_prefix(mutations, prefix)]
    untrusted += [name for name in UNTRUSTED_NAMES if not removes_name(mutations, name)]
    if untrusted:
        yield finding("client_headers_kept", way.place, headers=_listed(untrusted))


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
