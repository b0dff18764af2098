"""Makes the sources of a configuration: each with its pool, its role, and what makes it the same after a reload."""

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Final

from dp_extproc.config.discovery import DnsSettings, FileSettings, KubernetesSettings
from dp_extproc.config.envoy import BodyMode
from dp_extproc.config.pools import PoolConfig, RoutingFields
from dp_extproc.config.problems import Problem, spell
from dp_extproc.config.schema import Config
from dp_extproc.engines.model import Role, SourceKind
from dp_extproc.fleet.discovery.dns import DnsSource, missing_library
from dp_extproc.fleet.discovery.file import FileSource
from dp_extproc.fleet.discovery.roster import Place, RoleSource
from dp_extproc.fleet.discovery.source import Source
from dp_extproc.fleet.discovery.static import members_of

Settings = DnsSettings | FileSettings | KubernetesSettings

_ROLES: Final = {"prefill": Role.PREFILL, "decode": Role.DECODE, "workers": Role.WORKER}
"""Role of the endpoints under each key of a pool."""


def make_source(settings: Settings) -> Source:
    """Make the source that reads what some settings name."""
    match settings:
        case DnsSettings():
            return DnsSource(settings)
        case FileSettings():
            return FileSource(settings)
        case KubernetesSettings():
            # It takes 50 ms to import.
            from dp_extproc.fleet.discovery.kubernetes.source import KubernetesSource  # noqa: PLC0415

            return KubernetesSource(settings)


def missing_libraries(config: Config) -> Iterator[Problem]:
    """Find the sources whose optional library is not installed. They must not be made."""
    for index, pool in enumerate(config.pools):
        for key, written in pool.sources():
            for position, settings in enumerate(written.dns):
                if (message := missing_library(settings)) is not None:
                    yield Problem(None, spell(("pools", index, key, "dns", position)), message)


def role_sources(config: Config) -> tuple[RoleSource, ...]:
    """List the sources of each pool and role in the order of the configuration.

    A source keeps its key while its role and its settings stay, also in a pool of another name.
    """
    seen: Counter[Hashable] = Counter()

    def key_of(role: Role, settings: Settings | None) -> Hashable:
        seen[role, settings] += 1
        return role, settings, seen[role, settings]

    found = []
    for pool in config.pools:
        for name, written in pool.sources():
            place = _place(config, pool, _ROLES[name])
            if written.endpoints:
                members = members_of(written.endpoints)
                key = key_of(place.role, None)
                found.append(RoleSource(key, place, SourceKind.STATIC, "configuration", members=members))
            reporting: tuple[Settings, ...] = (*written.dns, *written.file, *written.kubernetes)
            for settings in reporting:
                source = make_source(settings)
                key = key_of(place.role, settings)
                found.append(RoleSource(key, place, source.kind, str(source), source.keep_for, source))
    return tuple(found)


def _place(config: Config, pool: PoolConfig, role: Role) -> Place:
    return Place(
        pool.name,
        role,
        engine=pool.engine,
        needs_overrides=pool.routing_fields is RoutingFields.HEADERS,
        headers_only=config.envoy.body_mode is BodyMode.NONE,
        has_tls=config.engine_tls is not None,
    )
