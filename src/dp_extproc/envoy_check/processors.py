"""The ext_proc filters of a way."""

from dataclasses import replace
from typing import Final

from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    ExtProcOverrides,
    ExtProcPerRoute,
)

from dp_extproc.envoy_check.ways import HttpStep

_OVERRIDDEN: Final = ("grpc_service", "processing_mode", "failure_mode_allow", "metadata_options")


def on_route(step: HttpStep) -> ExternalProcessor | None:
    """Return the settings that an ext_proc filter has on its route; None for other filters."""
    if not isinstance(step.settings, ExternalProcessor):
        return None
    overrides = step.on_route.overrides if isinstance(step.on_route, ExtProcPerRoute) else None
    return step.settings if overrides is None else _overridden(step.settings, overrides)


def cluster_of(processor: ExternalProcessor) -> str:
    """Return the cluster that a filter calls, or the address if Envoy's gRPC client is not used."""
    service = processor.grpc_service
    if service is None:
        return ""
    if service.envoy_grpc is not None:
        return service.envoy_grpc.cluster_name
    return service.google_grpc.target_uri if service.google_grpc is not None else ""


def _overridden(settings: ExternalProcessor, overrides: ExtProcOverrides) -> ExternalProcessor:
    given = {name: value for name in _OVERRIDDEN if (value := getattr(overrides, name)) is not None}
    return replace(settings, **given)
