"""The bodies of the two legs.

Envoy mirrors one body to both legs. So the keys that differ between them stand at the very front of the object,
the *leg prefix*, and on the prefill leg Envoy replaces that many bytes by the prefill leg's own prefix. Behind it
stand the keys that both legs share, and then whatever the client sent, byte for byte.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from dp_extproc import contract
from dp_extproc.request.body import OLD_RANK, PREFILL_RANK, ROUTED_RANK
from dp_extproc.request.members import JsonObject

BOOTSTRAP_HOST: Final = "bootstrap_host"
BOOTSTRAP_PORT: Final = "bootstrap_port"
BOOTSTRAP_ROOM: Final = "bootstrap_room"

ROUTING_KEYS: Final = frozenset({ROUTED_RANK, PREFILL_RANK, OLD_RANK, BOOTSTRAP_HOST, BOOTSTRAP_PORT, BOOTSTRAP_ROOM})
"""Never passed on from a client."""

STREAM_KEYS: Final = ("stream", "stream_options")
"""The client's own on the decode leg. The prefill leg does not stream, so that its status tells how it went."""

LEG_KEYS: Final = ROUTING_KEYS | {"rid", *STREAM_KEYS}


Headers = tuple[tuple[str, bytes], ...]


class Bootstrap(Struct, frozen=True):
    """Where and as what the two legs of an attempt meet."""

    host: str
    port: int
    rooms: int | Sequence[int]
    """One, or one for each prompt of a batch."""


class LegFields(Struct, frozen=True):
    """What one leg's body says that the other's does not."""

    routed_rank: int | None
    prefill_rank: int | None
    request_id: str
    """Of characters that need no escaping in JSON."""


class LegBodies(Struct, frozen=True):
    """The decode leg's body, and what turns it into the prefill leg's."""

    decode: bytes
    prefix_length: int
    """The first bytes of ``decode`` that make up its leg prefix."""
    prefill_prefix: bytes

    @property
    def prefill(self) -> bytes:
        """The prefill leg's body, as Envoy will make it."""
        return self.prefill_prefix + self.decode[self.prefix_length :]


def rewrite_disaggregated(
    body: JsonObject, batch: int | None, bootstrap: Bootstrap, prefill: LegFields, decode: LegFields
) -> LegBodies:
    """Make the bodies of both legs of a disaggregated request.

    Args:
        body: What the client sent.
        batch: How many prompts it holds; None for a scalar prompt. Lists of request ids are needed for lists of
            prompts: older versions refuse a single one.
        bootstrap: The same for both legs.
        prefill: For the prefill leg.
        decode: For the decode leg.
    """
    values = body.values
    streaming = b"".join(_members({key: values[key]}) + b"," for key in STREAM_KEYS if key in values)
    decode_prefix = b"{" + _leg(decode, batch) + streaming
    prefill_prefix = b"{" + _leg(prefill, batch) + b'"stream":false,'
    shared = _members({
        BOOTSTRAP_HOST: bootstrap.host,
        BOOTSTRAP_PORT: bootstrap.port,
        BOOTSTRAP_ROOM: bootstrap.rooms,
    })  # fmt: skip
    comma = b"" if body.is_empty_without(LEG_KEYS) else b","
    text = b"".join([decode_prefix, shared, comma, *body.without(LEG_KEYS)])
    return LegBodies(text, len(decode_prefix), prefill_prefix)


def rewrite_aggregated(body: JsonObject, rank_key: str | None, rank: int | None) -> bytes:
    """Make the body for a server that does both prefill and decode.

    Args:
        body: What the client sent.
        rank_key: What the engine's version calls the rank; None when it takes none.
        rank: None leaves it to the engine.
    """
    fields = b"" if rank is None or rank_key is None else _members({rank_key: rank})
    comma = b"," if fields and not body.is_empty_without(ROUTING_KEYS) else b""
    return b"".join([b"{", fields, comma, *body.without(ROUTING_KEYS)])


def override_headers(bootstrap: Bootstrap, prefill: LegFields, decode: LegFields) -> Headers:
    """Make the headers that say what :func:`rewrite_disaggregated` says in bodies.

    Args:
        bootstrap: With a single room; headers carry no lists.
        prefill: For the prefill leg.
        decode: For the decode leg. Both name the same prefill rank.
    """
    return tuple(_headers(bootstrap, prefill, decode))


def _headers(bootstrap: Bootstrap, prefill: LegFields, decode: LegFields) -> Iterator[tuple[str, bytes]]:
    yield f"{contract.OVERRIDE_PREFIX}bootstrap-host", bootstrap.host.encode()
    yield f"{contract.OVERRIDE_PREFIX}bootstrap-port", b"%d" % bootstrap.port
    yield f"{contract.OVERRIDE_PREFIX}bootstrap-room", str(bootstrap.rooms).encode()
    yield contract.OVERRIDE_RID, decode.request_id.encode()
    if decode.routed_rank is not None:
        yield contract.OVERRIDE_RANK, b"%d" % decode.routed_rank
    if decode.prefill_rank is not None:
        yield f"{contract.OVERRIDE_PREFIX}disagg-prefill-dp-rank", b"%d" % decode.prefill_rank
    yield contract.PREFILL_RID, prefill.request_id.encode()
    if prefill.routed_rank is not None:
        yield contract.PREFILL_RANK, b"%d" % prefill.routed_rank


def _leg(fields: LegFields, batch: int | None) -> bytes:
    text = ""
    if fields.routed_rank is not None:
        text += f'"{ROUTED_RANK}":{fields.routed_rank},'
    if fields.prefill_rank is not None:
        text += f'"{PREFILL_RANK}":{fields.prefill_rank},'
    if batch is None:
        return f'{text}"rid":"{fields.request_id}",'.encode()
    # Schedulers abort by prefix of the id: "-7" must not be a prefix of "-71", hence the closing dot.
    ids = ",".join(f'"{fields.request_id}-{index}."' for index in range(batch))
    return f'{text}"rid":[{ids}],'.encode()


def _members(members: dict[str, Any]) -> bytes:
    return msgspec.json.encode(members)[1:-1]
