"""Names of the clusters and listeners. One prefix keeps them apart from other ones in the same Envoy."""

from typing import Self

from msgspec import Struct

from dp_extproc.config import Config


class Names(Struct, frozen=True):
    """The names of clusters and listeners in one Envoy. Statistics have them too."""

    inference: str
    """The listener for clients."""
    dispatch: str
    """The internal listener that schedules requests, and the cluster that leads to it."""
    prefill_leg: str
    """The internal listener of prefill legs, and the cluster that leads to it."""
    decode: str
    """Leads to an internal listener if truncated streams end with an error event, else to the decode endpoint."""
    decode_server: str
    """The cluster behind the internal listener :attr:`decode`."""
    prefill: str
    """The cluster of prefill endpoints."""
    service: str
    """The cluster of the service."""
    service_owner: str
    """The cluster of the process of the service that scheduled a request."""
    traces: str
    """The cluster of the collector of spans."""
    logs: str
    """Beginning of the names of the clusters of collectors of access logs."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the names that a configuration gives (``envoy.name_prefix``)."""
        prefix = config.envoy.name_prefix
        return cls(
            inference=f"{prefix}inference",
            dispatch=f"{prefix}dp_dispatch",
            prefill_leg=f"{prefix}prefill_leg",
            decode=f"{prefix}decode",
            decode_server=f"{prefix}decode_server",
            prefill=f"{prefix}prefill",
            service=f"{prefix}extproc",
            service_owner=f"{prefix}extproc_owner",
            traces=f"{prefix}trace_collector",
            logs=f"{prefix}log_collector",
        )
