"""Who sends the prefill leg, and the section ``picker``: what a gateway lets an endpoint picker do."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from dp_extproc.config.section import SecondsOrNone, Section


class PrefillLeg(StrEnum):
    """Who sends the prefill leg of a request."""

    ENVOY = "envoy"
    """Envoy mirrors the request. A crash of the service costs no prefill leg."""
    SERVICE = "service"
    """The service sends the leg itself, so that any gateway can send the decode leg."""


class PickerSettings(Section):
    """What a gateway in front of an endpoint picker allows. Only pools with prefill and decode need these settings."""

    hold: SecondsOrNone = 0.15
    """Longest time for which response headers wait for prefill, where response bodies are not sent in full duplex.

    Keep it below the gateway's ``message_timeout``: 200 ms in Envoy and in Envoy Gateway unless it is set. ``0s`` never
    holds headers. A failure of prefill after that time can only end the decode leg.
    """
    fallbacks: Annotated[int, Field(ge=0, le=3)] = 0
    """Further decode endpoints behind the picked one, for gateways that retry on ``connect-failure`` alone."""
