"""Which headers the filters of a way remove."""

from collections.abc import Iterable, Sequence

from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutation
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import HeaderMutation as MutationFilter
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import HeaderMutationPerRoute, Mutations
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import (
    HeaderMutation as EarlyMutation,
)

from dp_extproc.envoy_check.messages import unpack
from dp_extproc.envoy_check.ways import Way


def removed_from_requests(way: Way) -> list[HeaderMutation]:
    """Return the mutations of requests on a way, before or in the filters of its listener."""
    early = [unpack(each.typed_config) for each in way.manager.early_header_mutation_extensions]
    found = [mutation for each in early if isinstance(each, EarlyMutation) for mutation in each.mutations]
    return found + [mutation for each in _mutations(way) for mutation in each.request_mutations]


def removed_from_responses(way: Way) -> list[HeaderMutation]:
    """Return the mutations of responses on a way."""
    return [mutation for each in _mutations(way) for mutation in each.response_mutations]


def removes_name(mutations: Iterable[HeaderMutation], name: str) -> bool:
    """Return whether a header is removed, by its name or by a prefix of it."""
    return any(
        (each.remove or "").lower() == name or any(name.startswith(prefix) for prefix in _prefix(each))
        for each in mutations
    )


def removes_prefix(mutations: Iterable[HeaderMutation], prefix: str) -> bool:
    """Return whether all headers with a prefix are removed."""
    return any(prefix.startswith(found) for each in mutations for found in _prefix(each))


def _prefix(mutation: HeaderMutation) -> Sequence[str]:
    match = mutation.remove_on_match
    prefix = match.key_matcher.prefix if match is not None and match.key_matcher is not None else None
    return [prefix.lower()] if prefix else []


def _mutations(way: Way) -> Iterable[Mutations]:
    for step in way.steps:
        for settings in (step.settings, step.on_route):
            if isinstance(settings, (MutationFilter, HeaderMutationPerRoute)) and settings.mutations is not None:
                yield settings.mutations
