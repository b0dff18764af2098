"""Encodes a scheduled request for its targets: the body and the headers of each leg, and the tokens and ids in them."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from dp_extproc import contract
from dp_extproc.engines.credentials import Credentials
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.client_ids import ClientIds
from dp_extproc.request.rewrite import LegBodies, request_ids
from dp_extproc.response.renaming import Renames
from dp_extproc.scheduling.bootstrap_room import draw_room
from dp_extproc.scheduling.decision import Headers, LegAbort, PrefillRequest
from dp_extproc.scheduling.picker import Targets
from dp_extproc.scheduling.routing_fields import (
    DECODE_SUFFIX,
    PREFILL_SUFFIX,
    encode_aggregated,
    encode_legs,
    mirror_headers,
)

_WATCHED: Final = ((contract.WATCH, b"1"),)
_WATCHED_WHOLLY: Final = ((contract.WATCH, contract.WATCH_ALL.encode()),)


class LegSettings(Struct, frozen=True):
    """Who sends the legs of a request, and who reports on them."""

    sends_prefill: bool = False
    """Whether the service sends the prefill leg itself; else Envoy mirrors the request."""
    reports_first_events: bool = False
    """Whether Envoy sends the first event of streamed responses to the service, on a stream of its own."""
    fallbacks: int = 0
    """Number of further decode endpoints that a decision names."""


class Encoded(Struct, frozen=True):
    """A request as it leaves for its targets."""

    body: bytes | None
    """The new body; None leaves the client's."""
    headers: Headers
    leg: str = ""
    """Token of the prefill leg; empty if there is none."""
    prefill: PrefillRequest | None = None
    """The prefill leg, where the service sends it."""
    abort: LegAbort | None = None
    """What ends the decode leg, where Envoy or its engine may fail to."""
    fallbacks: tuple[str, ...] = ()
    """Addresses of further decode endpoints."""
    client_ids: ClientIds | None = None
    """The ids that the client has given."""
    legs: tuple[LegAbort, ...] = ()
    """What ends each leg, if the client has given ids."""
    renames: Renames | None = None
    """The ids to be changed in the response; None for none, and where Envoy does not send it to the service."""


class RequestEncoder:
    """Encodes the requests of one worker process."""

    def __init__(
        self, settings: LegSettings, credentials: Credentials, *, owner: str, rng: Random, draw_token: Callable[[], str]
    ) -> None:
        """Set up; :class:`.Scheduler` describes the arguments."""
        self._settings = settings
        self._credentials = credentials
        self._owner = owner.encode()
        self._rng = rng
        self._draw_token = draw_token

    def encode(
        self,
        pool: str,
        request: InferenceRequest,
        targets: Targets,
        now: float,
        *,
        others: Sequence[EndpointLoad],
        in_headers: bool,
    ) -> Encoded:
        """Encode a request.

        Args:
            pool: The name of its pool.
            request: The request.
            targets: Its targets.
            now: The time at which endpoints that are ejected take no request.
            others: Decode endpoints that the picked prefill endpoint can be paired with, the picked one included.
            in_headers: Whether routing fields stand in headers where these can hold them.
        """
        prefill, decode = targets.prefill, targets.decode
        keys = self._credentials.headers(pool)
        client_ids = request.client_ids
        if prefill is None:
            aggregated = encode_aggregated(request, decode)
            headers = (*aggregated.headers, *keys)
            own = () if client_ids is None else (LegAbort(pool, (decode.endpoint.address,), client_ids.each, keys),)
            return Encoded(aggregated.body, headers, client_ids=client_ids, legs=own)
        rng, batch, residues = self._rng, request.prompt.batch, (prefill.residue, decode.residue)
        rooms = draw_room(rng, *residues) if batch is None else [draw_room(rng, *residues) for _ in range(batch)]
        leg, request_id = self._draw_token(), f"dp{rng.getrandbits(96):024x}"
        encoding = encode_legs(request, prefill, decode, rooms, request_id, in_headers=in_headers)
        renames = self._renames(client_ids, f"{request_id}{DECODE_SUFFIX}", is_batch=batch is not None)
        is_watched = renames is not None or (request.stream is not False and self._settings.reports_first_events)
        watched = _WATCHED_WHOLLY if renames is not None else _WATCHED
        attempt = ((contract.OWNER, self._owner), (contract.LEG, leg.encode()), *(watched if is_watched else ()))
        bodies = encoding.bodies
        ids = request_ids(f"{request_id}{DECODE_SUFFIX}", batch)
        runs_on = request.stream is not False and not decode.endpoint.capabilities.ends_closed
        fallbacks = self._fallbacks(decode, others, now)
        abort = LegAbort(pool, (decode.endpoint.address, *fallbacks), ids, keys, precedes_close=runs_on)
        legs: tuple[LegAbort, ...] = ()
        if client_ids is not None:
            prefill_ids = request_ids(f"{request_id}{PREFILL_SUFFIX}", batch)
            prefill_abort = LegAbort(pool, (prefill.endpoint.address,), prefill_ids, keys)
            legs = (replace(abort, precedes_close=False), prefill_abort)
        if self._settings.sends_prefill:
            assert bodies is not None  # noqa: S101 - the configuration has no routing fields in headers
            return Encoded(
                bodies.decode,
                (*(attempt if is_watched else ()), *keys),
                leg,
                _prefill_request(pool, prefill, bodies, keys),
                abort,
                fallbacks,
                client_ids,
                legs,
                renames,
            )
        return Encoded(
            encoding.body,
            (
                (contract.PREFILL_HOST, prefill.endpoint.address.encode()),
                *(encoding.headers if bodies is None else mirror_headers(bodies)),
                *attempt,
                *keys,
            ),
            leg,
            abort=abort if runs_on else None,
            client_ids=client_ids,
            legs=legs,
            renames=renames,
        )

    def _renames(self, client_ids: ClientIds | None, decode_id: str, *, is_batch: bool) -> Renames | None:
        """Return what to change in the response, so that the client sees the ids that it has given."""
        if client_ids is None or not self._settings.reports_first_events:
            return None
        return Renames(decode_id, tuple(msgspec.json.encode(each)[1:-1] for each in client_ids.each), is_batch)

    def _fallbacks(self, decode: Target, others: Sequence[EndpointLoad], now: float) -> tuple[str, ...]:
        """Draw further decode endpoints that can serve the body which is made for the picked one."""
        if not self._settings.fallbacks:
            return ()
        able = [
            each for each in others if each is not decode.endpoint and each.takes(now) and _serves_body_of(decode, each)
        ]
        return tuple(each.address for each in self._rng.sample(able, min(self._settings.fallbacks, len(able))))


def _prefill_request(pool: str, prefill: Target, bodies: LegBodies, keys: Headers) -> PrefillRequest:
    tail = memoryview(bodies.decode)[bodies.preamble_length :]
    return PrefillRequest(pool, prefill.endpoint.address, bodies.prefill_preamble, tail, keys)


def _serves_body_of(target: Target, endpoint: EndpointLoad) -> bool:
    """Return whether an endpoint reads the rank of a target from the same body, and has that rank."""
    other = target.endpoint
    if endpoint.capabilities != other.capabilities or endpoint.facts.single_rank != other.facts.single_rank:
        return False
    if target.rank is None or not target.routed:  # a bootstrap room leads to a rank by the number of ranks
        return len(endpoint.ranks) == len(other.ranks)
    return target.rank < len(endpoint.ranks)
