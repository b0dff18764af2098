"""Compares the endpoints of a role with each other, and notes what they have in common."""

from collections.abc import Iterable

from dp_extproc.estimators.decode_pace import compare
from dp_extproc.estimators.prefill_speed import compare_speeds
from dp_extproc.load.decode import DecodeGroup
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.prefill import PrefillGroup


def compare_pace(endpoints: Iterable[EndpointLoad]) -> None:
    """Set how slow each of these decode or aggregated endpoints is, against their average."""
    groups = [group for endpoint in endpoints for group in endpoint.groups if isinstance(group, DecodeGroup)]
    if (found := compare([group.pace for group in groups])) is not None:
        usual, slow = found
        for group, slowness in zip(groups, slow, strict=True):
            group.compare_with(usual, slowness)


def compare_prefill(endpoints: Iterable[EndpointLoad]) -> None:
    """Set how slow each of these prefill endpoints is, against their average."""
    both = [pair for endpoint in endpoints for pair in zip(endpoint.groups, endpoint.prefill_speeds, strict=True)]
    for (group, _), slowness in zip(both, compare_speeds([speed for _, speed in both]), strict=True):
        if slowness != group.slowness:
            group.slowness = slowness
            group.changed = True


def note_room(prefills: Iterable[EndpointLoad], *, is_full: bool) -> None:
    """Note on prefill endpoints whether decode is full."""
    for group in (group for endpoint in prefills for group in endpoint.groups):
        if isinstance(group, PrefillGroup):
            group.waits_for_decode = is_full
