"""Reads what a method and a path ask for. A path that is not in the table of routes never reaches an engine.

A prefill engine with several DP ranks ends its whole process at a request without a bootstrap room (assertion in
SGLang's ``data_parallel_controller.py``). A path whose handler builds a request object of its own drops the bootstrap
room, so such paths are passed to aggregated pools alone.
"""

from dataclasses import dataclass
from typing import Final

from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import ABORT, ROUTES, Api, Cause, Route, Treatment, find_route

__all__ = ["Abort", "Api", "Asked", "Models", "Moved", "Passed", "read_path", "refuse_disaggregated_path"]

_STATUS: Final = {Cause.CONTROL: 403, Cause.ONE_ENGINE: 404, Cause.STORED: 404, Cause.SOCKET: 404}


@dataclass(frozen=True, slots=True)
class Models:
    """A request for the list of models, or for one of them, which the service itself answers."""

    path: str


@dataclass(frozen=True, slots=True)
class Abort:
    """A request that ends another one, by the id that the client has given to that."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A request that any engine of a pool can answer."""

    route: Route
    is_head: bool = False
    """Whether only the status is asked for. FastAPI has no HEAD for its GET routes, so the service answers it."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A known path with a slash at its end. FastAPI redirects to the path without it, and so does the service."""

    location: str


Asked = Api | Models | Abort | Passed | Moved | Rejection


def read_path(method: str, path: str) -> Asked:
    """Read what a request asks for.

    Args:
        method: The method as it was received, in upper case.
        path: The ``:path`` pseudo header with its query. It is compared without decoding, so that an escaped or
            doubled slash, which an engine may decode, is an unknown path.
    """
    plain, mark, query = path.partition("?")
    route = find_route(plain)
    if plain.endswith("/") and (route is None or route.path == plain):
        without = find_route(plain[:-1])
        if without is not None and plain[:-1] == without.path:
            return Moved(plain[:-1] + mark + query)
    if route is None:
        message = f"unknown path {plain[:200]!r}; {_supported()}"
        return Rejection(404, Reason.UNKNOWN_PATH, message)
    if route.cause is not None:
        return Rejection(_STATUS[route.cause], Reason.PATH_REFUSED, f"{plain[:200]} {route.cause.value}")
    if method not in route.takes:
        allowed = ", ".join(sorted(route.takes))
        message = f"{plain[:200]} takes {allowed}, not {method}"
        return Rejection(405, Reason.WRONG_METHOD, message, headers=(("allow", allowed),))
    if route.treatment is Treatment.ROUTED:
        return Api(route.path)
    if route is ABORT:
        return Abort()
    return Models(plain) if route.treatment is Treatment.ANSWERED else Passed(route, is_head=method == "HEAD")


def refuse_disaggregated_path(path: str) -> Rejection:
    """Refuse a request that its engine would compute without a bootstrap room, where the pool is disaggregated."""
    message = (
        f"{path} is served by aggregated pools (workers) alone: SGLang takes no bootstrap room on this path, and "
        f"prefill and decode engines cannot compute a request without one; {_supported()}"
    )
    return Rejection(400, Reason.CANNOT_CARRY_ROUTING, message)


def _supported() -> str:
    shown = (Treatment.ROUTED, Treatment.ANSWERED)
    paths = [route.path for route in ROUTES if route.treatment in shown and not route.path.endswith("/")]
    return f"supported: {', '.join(paths)}, and paths that any engine can answer, such as /tokenize and /health"
