"""What the clusters are called; some of them are internal listeners of the same name."""

from typing import Final

DISPATCH: Final = "dp_dispatch"
PREFILL_LEG: Final = "prefill_leg"
SERVICE: Final = "extproc"
SERVICE_OWNER: Final = "extproc_owner"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
"""Also the listener of this name, where streams are to end with an event."""
DECODE_SERVER: Final = "decode_server"
