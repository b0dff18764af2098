"""Make messages that no replica would send; each has ended a replica, or all of its requests, before it was refused."""

import math
from typing import Final

import msgspec

from dp_extproc.load.records import PlacementRecord
from dp_extproc.sync.messages import VERSION, Batch, FirstToken, Placed, encode

HEADER: Final = b"dpx" + bytes([VERSION])
DEEP: Final = b"\x91" * 20_000 + b"\x90"
"""Arrays of one array each, 20,000 deep."""
NESTED: Final = HEADER + b"\x96" + msgspec.msgpack.encode(Batch("p", 1, 1000.0, ()))[1:] + DEEP
"""They stand where a later release may have added something, which is passed over."""


def hostile_messages(record: PlacementRecord) -> list[bytes]:
    """Make messages of every kind about a placement record. All are garbage."""
    cost = record.cost
    records = [
        *(msgspec.structs.replace(record, cached=each) for each in (math.nan, math.inf, -1.0)),
        *(
            msgspec.structs.replace(record, cost=msgspec.structs.replace(cost, **changed))
            for changed in (
                {"tokens": math.inf},
                {"tokens": math.nan},
                {"tokens": -1e9},
                {"tokens": 1.7e308},
                {"requests": math.inf},
                {"requests": -1.0},
                {"text_bytes": 1 << 63},
                {"known_tokens": -1},
            )
        ),
    ]
    messages = [encode(Batch(f"peer-{number}", 1, 1.0, (Placed(1, 1.0, each),))) for number, each in enumerate(records)]
    moments = [
        encode(Batch("clock-1", 1, math.inf, ())),
        encode(Batch("clock-2", 1, -1e308, (Placed(1, 1e308, record), FirstToken(1, math.nan)))),
    ]
    return [NESTED, HEADER + DEEP, *messages, *moments]
