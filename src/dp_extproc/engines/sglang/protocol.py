"""The bootstrap protocol of SGLang releases: which prefill release a decode release understands.

It has no version of its own. Read off the sources of 0.4.6 to 0.5.23 (``disaggregation/common/conn.py``,
``disaggregation/mooncake/conn.py``, ``disaggregation/utils.py``):

- 0.5.1 renames the fields with which a prefill engine answers ``/route``.
- 0.5.3 inserts a metadata buffer. Buffers have no names, so those behind it land in the wrong ones.
- 0.5.9 appends a metadata buffer, in which decode expects the room. An older prefill engine has none to send.
- 0.5.10 renames the parameters and the fields of ``/route``. From then on decode refuses a field that it does not have
  itself (``PrefillServerInfo(**data)``), and has a default for one that is missing.
- 0.5.16, 0.5.22 and 0.5.23 each add such fields. Those that a prefill engine leaves out unless they are in use make no
  difference: ``dsv41_spec_layout`` of 0.5.21 and ``kv_layout`` of 0.5.23.

So from 0.5.10 on, decode engines that are upgraded first understand all prefill engines. Up to 0.5.9 the order is the
reverse.

In the other direction, decode registers with prefill by a list of frames (``KVArgsRegisterInfo``). 0.5.12 packs those
of the state of a model in another way, and 0.5.17 inserts two before the last ones. For models without state (sliding
windows, Mamba, sparse attention) these frames are empty. No page shows whether a model has one, so this is no range.
"""

from itertools import pairwise
from typing import Final

from dp_extproc.engines.model import Version


def _v(text: str) -> Version:
    return Version(*map(int, text.split(".")))


_SINCE: Final = tuple(map(_v, ("0.0.0", "0.5.1", "0.5.3", "0.5.9", "0.5.10", "0.5.16", "0.5.22", "0.5.23")))
"""The first release of each range with one form of the protocol."""
_PREFILL_MAY_BE_NEWER: Final = (_v("0.5.3"), _v("0.5.10"))
"""From the first up to before the second, a newer prefill engine sends all that an older decode engine expects."""
_DECODE_MAY_BE_NEWER: Final = _v("0.5.10")
"""From here on a newer decode engine has a default for what an older prefill engine does not send."""


def understands(prefill: Version | None, decode: Version | None) -> bool:
    """Return whether a decode release understands a prefill release. One that is unknown may be any."""
    if prefill is None or decode is None or _range(prefill) == _range(decode):
        return True
    if min(prefill, decode) >= _DECODE_MAY_BE_NEWER:
        return prefill < decode
    first, end = _PREFILL_MAY_BE_NEWER
    return first <= decode < prefill < end


def release_range(version: Version) -> str:
    """Name the releases whose protocol is that of a release, such as ``0.5.16 to 0.5.20``."""
    since = _range(version)
    after = next((later for earlier, later in pairwise(_SINCE) if earlier == since), None)
    if after is None:
        return f"{since} and later"
    return f"{since} to before {after}" if since > _SINCE[0] else f"before {after}"


def _range(version: Version) -> Version:
    return max(since for since in _SINCE if since <= version)
