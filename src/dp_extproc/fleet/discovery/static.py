"""Lists the endpoints of a configuration. Pure."""

from typing import Final

from dp_extproc.config.envoy import BodyMode
from dp_extproc.config.pools import RoutingFields
from dp_extproc.config.schema import Config
from dp_extproc.engines.model import Endpoint, Role

_ROLES: Final = {"prefill": Role.PREFILL, "decode": Role.DECODE, "workers": Role.WORKER}
"""Role of the endpoints under each key of a pool."""


def endpoints_of(config: Config) -> tuple[Endpoint, ...]:
    """List every endpoint, pool by pool: prefill, decode, aggregated."""
    return tuple(
        Endpoint(
            url=each.url,
            host=each.host,
            port=each.port,
            pool=pool.name,
            role=_ROLES[key],
            dp_size=each.dp_size,
            dp_rank=each.dp_rank,
            engine=pool.engine,
            needs_overrides=pool.routing_fields is RoutingFields.HEADERS,
            headers_only=config.envoy.body_mode is BodyMode.NONE,
            bootstrap_host=each.bootstrap_host,
            bootstrap_port=each.bootstrap_port,
            group=each.group,
        )
        for pool in config.pools
        for key, _, each in pool.endpoints()
    )
