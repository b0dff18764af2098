"""Routing fields as ``x-override-*`` headers, which beat the body where SGLang is told to read them.

Envoy mirrors the decode leg's headers. What the prefill leg has of its own goes along under names of ours, and takes
its place on the prefill leg (SGLang: ``request_headers.py``, SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES).
"""

from collections.abc import Iterator

from dp_extproc import contract
from dp_extproc.request.rewrite import Bootstrap, LegFields

Headers = tuple[tuple[str, bytes], ...]


def override_headers(bootstrap: Bootstrap, prefill: LegFields, decode: LegFields) -> Headers:
    """Make the headers that say what :func:`~dp_extproc.request.rewrite.rewrite_disaggregated` says in bodies.

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
