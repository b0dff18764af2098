"""Rules for the block: the bootstrap extension, the internal listeners and the clusters."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from betterproto2 import Message
from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.core.v3 import RoutingPriority
from envoy_data_plane.envoy.config.listener.v3 import Listener

from dp_extproc.config import TruncatedStreams
from dp_extproc.envoy_check.differences import ABSENT, Difference, differences, shown
from dp_extproc.envoy_check.facts import Facts
from dp_extproc.envoy_check.findings import Finding, finding
from dp_extproc.envoy_check.messages import UnreadableError, mentions, read_message
from dp_extproc.envoy_check.snapshot import Resource, State
from dp_extproc.envoy_check.ways import forwards_to, ways_to

_EXTENSION: Final = "InternalListener"
_RUNTIME: Final = "envoy.wasm.runtime.v8"
_ENOUGH: Final = 100_000
"""Threshold of a circuit breaker that no gateway reaches."""
_DEFAULTS: Final = {"max_connections": 1024, "max_pending_requests": 1024, "max_requests": 1024, "max_retries": 3}
"""Envoy's thresholds where none are set."""
_MOST_DIFFERENCES: Final = 12
"""Differences of one resource that are listed. More of them have one cause."""


def extension(facts: Facts) -> Iterator[Finding]:
    """Look for the bootstrap extension of internal listeners, which has to be there exactly once."""
    if facts.snapshot.extensions is None:
        return
    count = list(facts.snapshot.extensions).count(_EXTENSION)
    if count != 1:
        yield finding("extension_twice" if count else "extension_missing", "bootstrap_extensions")


def runtime(facts: Facts) -> Iterator[Finding]:
    """Look whether Envoy has the WebAssembly runtime that the block needs."""
    built_in = facts.snapshot.built_in
    if facts.config.envoy.truncated_streams is TruncatedStreams.ERROR_EVENT and built_in and _RUNTIME not in built_in:
        yield finding("wasm_missing", f"listener {facts.names.decode}")


def twice(facts: Facts) -> Iterator[Finding]:
    """Look for names of the block that two listeners or two clusters have."""
    ours = facts.names_of_block
    for kind, resources in (("listener", facts.snapshot.listeners), ("cluster", facts.snapshot.clusters)):
        counts = Counter((each.name, each.state) for each in resources)
        for name in dict.fromkeys(name for (name, _), count in counts.items() if count > 1 and name in ours):
            yield finding("name_twice", f"{kind} {name}")


def present(facts: Facts) -> Iterator[Finding]:
    """Compare each listener and cluster of the block with the one of its name."""
    for kind, printed, known, all_of_kind in (
        ("listener", facts.block.listeners, facts.listeners, facts.snapshot.listeners),
        ("cluster", facts.block.clusters, facts.clusters, facts.snapshot.clusters),
    ):
        for each in printed:
            if each.name == facts.names.dispatch and each.name not in known and kind == "cluster" and facts.entrances:
                continue  # A controller chose the name of the cluster that leads into the block.
            yield from _compare(kind, each, known, all_of_kind)


def _compare(
    kind: str, printed: Listener | Cluster, known: Mapping[str, Resource], all_of_kind: Sequence[Resource]
) -> Iterator[Finding]:
    place = f"{kind} {printed.name}"
    if (resource := known.get(printed.name)) is None:
        others = sorted({each.name for each in all_of_kind if each.name.endswith(printed.name)})
        hint = f"; there is {', '.join(others)}, perhaps of another envoy.name_prefix" if others else ""
        yield finding(f"{kind}_missing", place, hint=hint)
        return
    if resource.state is not State.ACTIVE:
        yield finding("not_active", place, kind=kind, state=resource.state)
    try:
        found = read_message(type(printed), resource.data)
    except UnreadableError as error:
        yield _unreadable(place, error)
        return
    if taken := _taken(printed, found):
        yield finding("name_taken", place, found=taken)
        return
    yield from compare(place, printed, found)


def _taken(printed: Listener | Cluster, found: Listener | Cluster) -> str | None:
    """Return what has the name of a part of the block, if it cannot be that part."""
    if isinstance(printed, Listener) and isinstance(found, Listener) and found.internal_listener is None:
        return "a listener with an address"
    if isinstance(printed, Cluster) and isinstance(found, Cluster) and found.type != printed.type:
        return f"a cluster of type {found.type.name if found.type is not None else 'of an extension'}"
    return None


def compare(place: str, printed: Message, found: Message, ignored: Iterable[str] = ()) -> Iterator[Finding]:
    """Report each field that differs, except those that other rules compare."""
    skipped = _OTHER_RULES | set(ignored)
    try:
        listed = [each for each in differences(printed, found) if each.path[0] not in skipped]
    except UnreadableError as error:
        yield _unreadable(place, error)
        return
    for each in listed[:_MOST_DIFFERENCES]:
        yield _different(f"{place}: {each.where}", each)
    if (more := len(listed) - _MOST_DIFFERENCES) > 0:
        yield finding("field_differs", place, what=f"{more} more fields differ", found="another", printed="one")


def _unreadable(place: str, error: UnreadableError) -> Finding:
    return finding("field_differs", place, what="it cannot be read", found=str(error), printed="readable values")


_OTHER_RULES: Final = frozenset({"circuit_breakers", "outlier_detection"})
"""Fields of clusters with rules of their own."""


_NEEDED: Final = {
    "local_reply_config": "Envoy's own errors, or the retries that they ask for, differ",
    "failure_mode_allow": "a crash of the service does not pass as it should: responses in flight, or new requests",
    "processing_mode": "the service misses messages, or gets others",
    "allow_mode_override": "the service cannot ask for the text of a response",
    "message_timeout": "Envoy waits another time for the service",
    "max_message_timeout": "the service may not hold a response for as long as it has to",
    "forward_rules": "the service gets other headers than those that it reads",
    "metadata_options": "the access log has no decisions, and refusals lose their text",
    "initial_stream_window_size": "Envoy crashes when it has buffered a window of events",
    "connection_keepalive": "Envoy does not notice that the machine of the service is lost",
    "per_connection_buffer_limit_bytes": "larger bodies get a 413, or are not retried",
    "max_request_headers_kb": "large batches get a 431",
    "max_headers_count": "requests with many headers get a 431",
    "stream_idle_timeout": "long prompts are cut",
    "timeout": "long prompts or answers are cut",
    "early_header_mutation_extensions": "headers of clients may steer requests",
    "request_mirror_policies": "prefill gets no copy, or another one",
    "original_dst_lb_config": "Envoy does not dial the endpoint that was picked",
    "idle_timeout": "requests are sent into connections that engines close",
    "load_assignment": "the cluster leads elsewhere",
}
"""What fails if a field differs. The last one in a path counts."""
_CHOSEN: Final = {
    "access_log": "the log of requests differs",
    "body_format_override": "the text of an error of Envoy differs",
    "stat_prefix": "names of statistics differ",
    "alt_stat_name": "names of statistics differ",
    "delayed_close_timeout": "the end of a truncated response is delayed",
    "connect_timeout": "connections may take another time",
    "dns_lookup_family": "another family of addresses is used",
}
"""What changes if a field differs that an operator may choose."""
_LEFT_BY_GATEWAYS: Final = frozenset({
    "common_lb_config", "dns_lookup_family", "dns_refresh_rate", "ignore_health_on_host_removal", "lb_policy",
    "metadata", "respect_dns_ttl", "traffic_direction", "wait_for_warm_on_init", "upstream_bind_config",
    "enable_reuse_port", "upstream_connection_options", "load_balancing_policy", "alt_stat_name", "track_cluster_stats",
})  # fmt: skip
"""Fields of a listener or cluster that controllers add, and that change nothing for the block."""


def _different(place: str, difference: Difference) -> Finding:
    if difference.is_order:
        return finding("filter_order", place, found=difference.found, printed=difference.printed)
    values = {"found": shown(difference.found), "printed": shown(difference.printed)}
    if len(difference.path) == 1 and difference.printed is ABSENT and difference.path[0] in _LEFT_BY_GATEWAYS:
        return finding("setting_differs", place, what="it was added", **values)
    for field in reversed(difference.path):
        for code, known in (("field_differs", _NEEDED), ("setting_differs", _CHOSEN)):
            if field in known:
                return finding(code, place, what=known[field], **values)
    return finding("field_differs", place, what="it is not as printed", **values)


def breakers(facts: Facts) -> Iterator[Finding]:
    """Look at the circuit breakers of the block's clusters."""
    for printed in facts.block.clusters:
        if (found := facts.cluster(printed.name)) is not None:
            yield from low_breakers(f"cluster {found.name}", found)


def low_breakers(place: str, found: Cluster) -> Iterator[Finding]:
    """Report the lowest threshold of each kind: Envoy's default, or one that was chosen."""
    thresholds = found.circuit_breakers.thresholds if found.circuit_breakers else []
    default = [each for each in thresholds if each.priority == RoutingPriority.DEFAULT]
    for name, unset in _DEFAULTS.items():
        limit = getattr(default[0], name) if default else None
        if limit is None or (limit < _ENOUGH and limit == unset):
            yield finding("circuit_breakers", place, limit=unset, what=_words(name))
            return
        if limit < _ENOUGH:
            yield finding("circuit_breakers_low", place, limit=limit, what=_words(name))
            return


def _words(threshold: str) -> str:
    return threshold.removeprefix("max_").replace("_", " ")


def ejection(facts: Facts) -> Iterator[Finding]:
    """Look for outlier detection where the block has none."""
    for printed in facts.block.clusters:
        found = facts.cluster(printed.name)
        if found is None or found.type != printed.type:
            continue
        if printed.outlier_detection is None and found.outlier_detection is not None:
            yield finding("outlier_detection", f"cluster {found.name}")
        elif printed.outlier_detection is not None:
            plain = Cluster(outlier_detection=printed.outlier_detection)
            for each in differences(plain, Cluster(outlier_detection=found.outlier_detection)):
                yield _different(f"cluster {found.name}: {each.where}", each)


def exposed(facts: Facts) -> Iterator[Finding]:
    """Look for listeners outside of the block that lead past the place where requests are scheduled."""
    names = facts.names
    inner = {names.prefill_leg, names.decode, names.decode_server, names.prefill, names.service_owner}
    inner &= {each.name for each in facts.block.clusters}
    ours = {each.name for each in facts.block.listeners}
    for way in ways_to(facts.snapshot, inner, facts.skip, inside=ours):
        yield finding("cluster_exposed", way.place, entrance=names.dispatch)
    for resource in facts.snapshot.listeners:
        if resource.name in ours or not mentions(resource.data, inner):
            continue
        try:
            if forwards_to(read_message(Listener, resource.data), inner):
                yield finding("cluster_exposed", f"listener {resource.name}", entrance=names.dispatch)
        except UnreadableError as error:
            facts.skip(f"listener {resource.name}", str(error))
