"""Why no server of a role can take a request, in words that its sender can act on."""

from collections.abc import Sequence
from typing import Final

from dp_extproc.engines.adapter import unavailable
from dp_extproc.engines.compatibility import Difference, differences
from dp_extproc.engines.model import Role
from dp_extproc.engines.sglang.releases import HEADER_APIS
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.request.path import Api
from dp_extproc.request.rejection import Reason, Rejection

TRY_AGAIN: Final = (("retry-after", "1"),)
_REASONS: Final = 4
"""That one message names at most."""
_ALL_AGREE: Final = "all of them agree, but no two of them can serve this request now; try again shortly"

_BothRoles = tuple[Sequence[EndpointLoad], Sequence[EndpointLoad]]


def nobody_allowed(pool: str) -> Rejection:
    """Refuse a request because none of those that the gateway allows is ready."""
    message = f"no server for {pool} is ready among those that the gateway allows"
    return Rejection(503, Reason.NO_ENDPOINTS, message, headers=TRY_AGAIN)


def nobody_matches(pool: str, usable: _BothRoles, known: _BothRoles) -> Rejection:
    """Refuse a request because no two servers can be paired, or none of those that can is there.

    Args:
        pool: Whose servers.
        usable: Prefill and decode servers that could be asked now.
        known: All that have told what they are: what differs among them counts where these agree.
    """
    found = _differences(usable) or _differences(known)
    reasons = "; ".join(f"{each} ({each.remedy})" for each in found[:_REASONS])
    message = f"no prefill server for {pool} can be paired with a decode server that is there: {reasons or _ALL_AGREE}"
    return Rejection(503, Reason.NO_COMPATIBLE_PAIR, message, headers=TRY_AGAIN)


def _differences(hosts: _BothRoles) -> list[Difference]:
    prefills, decodes = hosts
    return differences((host.facts for host in prefills), (host.facts for host in decodes))


def nobody_can(pool: str, role: Role, hosts: Sequence[EndpointLoad], api: Api, *, is_read: bool) -> Rejection:
    """Refuse a request that none of its servers can serve.

    Args:
        pool: Whose servers.
        role: Of these servers.
        hosts: All that could be asked now; there may be none.
        api: What is asked for.
        is_read: Whether the request's body was seen here.
    """
    if not hosts:
        message = f"no {role} server of the pool for {pool} has been reached yet; try again shortly"
        return Rejection(503, Reason.NO_ENDPOINTS, message, headers=TRY_AGAIN)
    if not is_read and api not in HEADER_APIS:
        message = f"{api.value} takes no rank from headers, and bodies are not read here; use a path that does"
        return Rejection(400, Reason.CANNOT_CARRY_ROUTING, f"{message}: {', '.join(sorted(HEADER_APIS))}")
    if not is_read and not any(host.facts.reads_overrides for host in hosts):
        message = f"no {role} server of the pool for {pool} obeys x-override-* headers"
        return Rejection(503, Reason.NO_ENDPOINTS, message, headers=TRY_AGAIN)
    return unavailable(api, role, (host.facts for host in hosts))
