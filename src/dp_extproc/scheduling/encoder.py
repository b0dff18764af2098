"""Encodes a scheduled request for its targets: the body and the headers of each leg, and the tokens and ids in them."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Final

from msgspec import Struct

from dp_extproc import contract
from dp_extproc.engines.credentials import Credentials
from dp_extproc.load.endpoint import EndpointLoad, Target
from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.client_ids import read_client_ids
from dp_extproc.request.rewrite import LegBodies, request_ids
from dp_extproc.response.renaming import Renames
from dp_extproc.scheduling.bootstrap_room import draw_room
from dp_extproc.scheduling.decision import DecodeAbort, Headers, PrefillRequest
from dp_extproc.scheduling.picker import Targets
from dp_extproc.scheduling.routing_fields import DECODE_SUFFIX, encode_aggregated, encode_legs, mirror_headers

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
    abort: DecodeAbort | None = None
    """What ends the decode leg, where Envoy or its engine may fail to."""
    fallbacks: tuple[str, ...] = ()
    """Addresses of further decode endpoints."""
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
        if prefill is None:
            aggregated = encode_aggregated(request, decode)
            return Encoded(aggregated.body, (*aggregated.headers, *keys))
        rng, batch, residues = self._rng, request.prompt.batch, (prefill.residue, decode.residue)
        rooms = draw_room(rng, *residues) if batch is None else [draw_room(rng, *residues) for _ in range(batch)]
        leg, request_id = self._draw_token(), f"dp{rng.getrandbits(96):024x}"
        encoding = encode_legs(request, prefill, decode, rooms, request_id, in_headers=in_headers)
        renames = self._renames(request, f"{request_id}{DECODE_SUFFIX}")
        is_watched = renames is not None or (request.stream is not False and self._settings.reports_first_events)
        watched = _WATCHED_WHOLLY if renames is not None else _WATCHED
        attempt = ((contract.OWNER, self._owner), (contract.LEG, leg.encode()), *(watched if is_watched else ()))
        bodies = encoding.bodies
        ids = request_ids(f"{request_id}{DECODE_SUFFIX}", batch)
        runs_on = request.stream is not False and not decode.endpoint.capabilities.ends_closed
        if self._settings.sends_prefill:
            assert bodies is not None  # noqa: S101 - the configuration has no routing fields in headers
            fallbacks = self._fallbacks(decode, others, now)
            return Encoded(
                bodies.decode,
                (*(attempt if is_watched else ()), *keys),
                leg,
                _prefill_request(pool, prefill, bodies, keys),
                DecodeAbort(pool, (decode.endpoint.address, *fallbacks), ids, keys, precedes_close=runs_on),
                fallbacks,
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
            renames=renames,
            abort=DecodeAbort(pool, (decode.endpoint.address,), ids, keys, precedes_close=True) if runs_on else None,
        )

    def _renames(self, request: InferenceRequest, decode_id: str) -> Renames | None:
        """Return what to change in the response, so that the client sees the ids that it has given."""
        batch = request.prompt.batch
        client_ids = read_client_ids(request.api, request.body.values, batch)
        if not client_ids or not self._settings.reports_first_events:
            return None
        return Renames(decode_id, client_ids, batch is not None)

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
