"""Failures of requests to the API server, and what an operator does about each. Pure."""

from dataclasses import dataclass
from typing import Final

import msgspec

from dp_extproc.fleet.discovery.kubernetes.objects import Status

_LONGEST_RETRY_AFTER: Final = 300
"""Bound in seconds of what ``Retry-After`` may ask for: a wrong value must not end discovery."""
_SHOWN: Final = 300
"""Characters of a message that are logged."""
_STATUS: Final = msgspec.json.Decoder(Status)
_TOO_LARGE: Final = "ResourceVersionTooLarge"
"""Cause of a failure for a version that is not reached yet: etcd was restored, or another API server is ahead."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was tried."""

    verb: str
    """Verb of RBAC: ``list`` or ``watch``."""
    resource: str
    """Plural and group, such as ``endpointslices.discovery.k8s.io``."""
    namespace: str


class ApiError(Exception):
    """A request failed. The message ends with a remedy where there is one."""

    def __init__(self, message: str, *, retry_after: float = 0.0, expired: bool = False, quiet: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """The least seconds until the next try."""
        self.expired = expired
        """Whether the version of a watch, or of a page, is too old or too new: everything is to be listed again."""
        self.quiet = quiet
        """Whether this happens in normal operation, and is only a failure if the next try fails too."""


def read_status(text: bytes | msgspec.Raw) -> Status:
    """Read the status of a failure; one without a field if it is none, such as the page of a proxy."""
    try:
        return _STATUS.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return Status(message=bytes(text).decode("utf-8", "replace"))


def fault_of(code: int, status: Status, request: Request, retry_after: str | None = None) -> ApiError:
    """Make the fault of an error response, or of an ``ERROR`` event."""
    details = status.details
    causes = {each.reason for each in (details.causes if details else None) or ()}
    what = f"{request.verb} {request.resource} in namespace {request.namespace}"
    reason = " ".join((status.message or status.reason or "no reason given").split())[:_SHOWN]
    return ApiError(
        f"{what}: {code} {reason}{_remedy(code, request)}",
        retry_after=_seconds(retry_after, (details.retry_after_seconds if details else None) or 0),
        expired=code == 410 or _TOO_LARGE in causes,
    )


def _remedy(code: int, request: Request) -> str:
    plural, _, group = request.resource.partition(".")
    if code == 401:
        return "; the token is not accepted: check that the service account exists and that its token is mounted"
    if code == 403:
        return (
            f"; grant the verb {request.verb} on {plural} of apiGroups [{group!r}] to the service account, by a Role "
            f"and a RoleBinding in namespace {request.namespace} (list and watch are needed)"
        )
    if code == 404:
        needed = "Kubernetes 1.21 or later is needed"
        if plural == "inferencepools":
            needed = "install version v1 of the Gateway API Inference Extension's CustomResourceDefinitions"
        return f"; this API server has no such resource: {needed}"
    if code == 400:
        return "; write the selector as kubectl get --selector takes it"
    return ""


def _seconds(header: str | None, detail: int) -> float:
    asked = int(header[:9]) if header and header.isascii() and header.isdigit() else detail
    return float(min(max(0, asked), _LONGEST_RETRY_AFTER))
