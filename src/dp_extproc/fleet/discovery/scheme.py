"""Gives the members of a source the scheme of all engines. Pure."""

from dataclasses import replace

from dp_extproc.config.pools import SCHEMES, why_not
from dp_extproc.engines.model import SourceKind
from dp_extproc.fleet.discovery.source import Member


def with_scheme(members: tuple[Member, ...], kind: SourceKind, *, has_tls: bool) -> tuple[Member, ...] | str:
    """Return the members with the URLs that they have with or without ``engine_tls``.

    A file has URLs, and so the scheme. If one is wrong, the members cannot be used, and the reason is returned. Other
    sources have addresses, and report ``http://``.
    """
    if kind is SourceKind.FILE:
        wrong = ((each.url, why_not(each.url, has_tls=has_tls)) for each in members)
        return next((f"{url}: {reason}" for url, reason in wrong if reason is not None), members)
    if not has_tls:
        return members
    return tuple(replace(each, url=f"{SCHEMES[True]}://{each.url.partition('://')[2]}") for each in members)
