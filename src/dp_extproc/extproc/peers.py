"""The instances of gateways that have opened streams, and what each has shown of its settings."""

import logging
from typing import Final

import grpc.aio

from dp_extproc.attempt.gateways import Peer

_MOST: Final = 1024
"""Bounds the instances that are remembered. Where there are more, all are forgotten, and show their settings again."""

_log = logging.getLogger(__name__)


class Peers:
    """Remembers the instances of a gateway by their addresses."""

    __slots__ = ("_by_address", "_reported")

    def __init__(self) -> None:
        self._by_address: dict[str, Peer] = {}
        self._reported: set[str] = set()

    def of(self, context: grpc.aio.ServicerContext) -> Peer:
        """Return the instance that has opened a stream."""
        address = _address_of(context)
        if (peer := self._by_address.get(address)) is None:
            if len(self._by_address) >= _MOST:
                self._by_address.clear()
            peer = self._by_address[address] = Peer(sends_responses=False)
        return peer

    def report_skipped(self, context: grpc.aio.ServicerContext) -> None:
        """Log once for each instance that it sends no response headers."""
        address = _address_of(context)
        if address not in self._reported and len(self._reported) < _MOST:
            self._reported.add(address)
            _log.warning(
                "the gateway at %s has ended a stream before the response, and has sent no response headers so far: "
                "failures of prefill cannot be reported to clients; set response_header_mode to SEND",
                address,
            )


def _address_of(context: grpc.aio.ServicerContext) -> str:
    return str(context.peer()).rpartition(":")[0]
