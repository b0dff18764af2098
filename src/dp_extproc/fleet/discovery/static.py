"""The list of endpoints in the configuration, as members of a source that never changes. Pure."""

from collections.abc import Iterable

from dp_extproc.config.pools import EndpointConfig
from dp_extproc.fleet.discovery.source import Member


def members_of(endpoints: Iterable[EndpointConfig]) -> tuple[Member, ...]:
    """Make a member of each entry, in their order."""
    return tuple(
        Member(
            url=each.url,
            host=each.host,
            port=each.port,
            group=each.group,
            bootstrap_host=each.bootstrap_host,
            bootstrap_port=each.bootstrap_port,
            dp_size=each.dp_size,
            dp_rank=each.dp_rank,
        )
        for each in endpoints
    )
