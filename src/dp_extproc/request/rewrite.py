"""Writes the routing fields of a request: into the bodies of its legs, or as ``x-override-*`` headers.

Envoy mirrors the body and the headers of the decode leg to the prefill leg. So what differs between the legs is
replaced on the prefill leg:

- Body: the members that differ stand at the very front of the object, as the *leg preamble*. Envoy replaces that many
  bytes by the preamble of the prefill leg. Behind it stand the members that both legs share, and then whatever the
  client sent, byte for byte.
- Headers: what the prefill leg has of its own is sent under other names, and replaces the headers of the decode leg.
  Engines obey ``x-override-*`` only if they are set to (SGLang: ``request_headers.py``,
  SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES), and then before the body.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from dp_extproc import contract
from dp_extproc.request.body import OLD_RANK_KEY, PREFILL_RANK_KEY, ROUTED_RANK_KEY
from dp_extproc.request.members import JsonObject

BOOTSTRAP_HOST: Final = "bootstrap_host"
BOOTSTRAP_PORT: Final = "bootstrap_port"
BOOTSTRAP_ROOM: Final = "bootstrap_room"

ROUTING_KEYS: Final = frozenset(
    {ROUTED_RANK_KEY, PREFILL_RANK_KEY, OLD_RANK_KEY, BOOTSTRAP_HOST, BOOTSTRAP_PORT, BOOTSTRAP_ROOM}
)
"""Members that are never passed on from a client."""

STREAM_KEYS: Final = ("stream", "stream_options")
"""Members that only the decode leg has. The prefill leg does not stream, so that its status is its result."""

LEG_KEYS: Final = ROUTING_KEYS | {"rid", *STREAM_KEYS}
"""Members that are written anew for each leg."""

Headers = tuple[tuple[str, bytes], ...]


class Bootstrap(Struct, frozen=True):
    """The address and the bootstrap room under which the two legs of an attempt meet."""

    host: str
    port: int
    rooms: int | Sequence[int]
    """The bootstrap room, or one for each prompt of a batch."""


class LegFields(Struct, frozen=True):
    """The routing fields that differ between the legs."""

    routed_rank: int | None
    prefill_rank: int | None
    request_id: str
    """Has only characters that need no escaping in JSON."""


class LegBodies(Struct, frozen=True):
    """The body of the decode leg, and what makes the body of the prefill leg of it."""

    decode: bytes
    preamble_length: int
    """The length of the preamble at the front of ``decode``, in bytes."""
    prefill_preamble: bytes

    @property
    def prefill(self) -> bytes:
        """The body of the prefill leg, as Envoy makes it."""
        return self.prefill_preamble + self.decode[self.preamble_length :]


def rewrite_disaggregated(
    body: JsonObject, batch: int | None, bootstrap: Bootstrap, prefill: LegFields, decode: LegFields
) -> LegBodies:
    """Write the routing fields of a disaggregated request into the bodies of its legs.

    *batch* is the number of prompts in a list, None for a scalar prompt. A list of prompts needs a list of request ids,
    as older releases refuse a single one.
    """
    values = body.values
    streaming = b"".join(_members({key: values[key]}) + b"," for key in STREAM_KEYS if key in values)
    decode_preamble = b"{" + _leg(decode, batch) + streaming
    prefill_preamble = b"{" + _leg(prefill, batch) + b'"stream":false,'
    shared = _members({
        BOOTSTRAP_HOST: bootstrap.host, BOOTSTRAP_PORT: bootstrap.port, BOOTSTRAP_ROOM: bootstrap.rooms,
    })  # fmt: skip
    comma = b"" if body.is_empty_without(LEG_KEYS) else b","
    text = b"".join([decode_preamble, shared, comma, *body.without(LEG_KEYS)])
    return LegBodies(text, len(decode_preamble), prefill_preamble)


def rewrite_aggregated(body: JsonObject, rank_key: str | None, rank: int | None) -> bytes:
    """Write the rank of an aggregated endpoint into the body of a request, under the key of the engine's release.

    Without a key or a rank, the engine picks the rank.
    """
    fields = b"" if rank is None or rank_key is None else _members({rank_key: rank})
    comma = b"," if fields and not body.is_empty_without(ROUTING_KEYS) else b""
    return b"".join([b"{", fields, comma, *body.without(ROUTING_KEYS)])


def override_headers(bootstrap: Bootstrap, prefill: LegFields, decode: LegFields) -> Headers:
    """Write the routing fields of a disaggregated request as headers that engines obey before the body.

    There must be a single bootstrap room, as headers have no lists. Both legs name the same prefill rank, if any.
    """
    fields = (
        (f"{contract.OVERRIDE_PREFIX}bootstrap-host", bootstrap.host),
        (f"{contract.OVERRIDE_PREFIX}bootstrap-port", bootstrap.port),
        (f"{contract.OVERRIDE_PREFIX}bootstrap-room", bootstrap.rooms),
        (contract.OVERRIDE_RID, decode.request_id),
        (contract.OVERRIDE_RANK, decode.routed_rank),
        (f"{contract.OVERRIDE_PREFIX}disagg-prefill-dp-rank", decode.prefill_rank),
        (contract.PREFILL_RID, prefill.request_id),
        (contract.PREFILL_RANK, prefill.routed_rank),
    )
    return tuple((name, str(value).encode()) for name, value in fields if value is not None)


def request_ids(request_id: str, batch: int | None) -> tuple[str, ...]:
    """Return the ids of a leg: one, or one for each prompt of a batch."""
    if batch is None:
        return (request_id,)
    # Schedulers abort by prefix of the id: "-7" must not be a prefix of "-71", hence the closing dot.
    return tuple(f"{request_id}-{index}." for index in range(batch))


def _leg(fields: LegFields, batch: int | None) -> bytes:
    text = ""
    if fields.routed_rank is not None:
        text += f'"{ROUTED_RANK_KEY}":{fields.routed_rank},'
    if fields.prefill_rank is not None:
        text += f'"{PREFILL_RANK_KEY}":{fields.prefill_rank},'
    if batch is None:
        return f'{text}"rid":"{fields.request_id}",'.encode()
    ids = ",".join(f'"{each}"' for each in request_ids(fields.request_id, batch))
    return f'{text}"rid":[{ids}],'.encode()


def _members(members: dict[str, Any]) -> bytes:
    return msgspec.json.encode(members)[1:-1]
