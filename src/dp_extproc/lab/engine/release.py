"""List how SGLang releases differ for a client or a router.

Each line names the release that introduced the behaviour. Sources: the wheels of 0.4.5 to 0.5.23 and the pull requests
named beside the lines.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

_NUMBERS: Final = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")


class Disconnect(Enum):
    """What follows when the client of a stream closes its connection."""

    ABORTS_LATER = auto()
    """A background task of the response aborts the request (``create_abort_task``); ``/v1/responses`` has none."""
    ABORTS = auto()
    """The request is aborted at once, on every path."""
    RUNS_ON = auto()
    """The HTTP process forgets the request and aborts nothing, so the scheduler computes it to its end."""


@dataclass(frozen=True, slots=True, order=True)
class Release:
    """Identify a release by its three numbers; suffixes such as ``.post1`` change nothing here."""

    major: int
    minor: int
    patch: int

    @classmethod
    def parse(cls, text: str) -> "Release":
        """Read ``0.5.10.post1`` as 0.5.10.

        Raises:
            ValueError: It does not begin with three numbers.
        """
        match = _NUMBERS.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not a version such as 0.5.23")
        return cls(int(match[1]), int(match[2]), int(match[3]))

    def since(self, text: str) -> bool:
        """Check whether this release is *text* or later."""
        return self >= Release.parse(text)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @property
    def routes_by_field(self) -> bool:
        """Whether it has ``routed_dp_rank``, ``disagg_prefill_dp_rank``, a range check and ``X-Data-Parallel-Rank``."""
        return self.since("0.5.10")

    @property
    def wraps_bootstrap_hosts(self) -> bool:
        """Whether decode puts brackets around an IPv6 ``bootstrap_host`` (``_bootstrap_addr``, ``decode.py``).

        Until 0.5.9 it makes an invalid URL of such an address.
        """
        return self.since("0.5.10")

    def takes_bootstrap(self, path: str) -> bool:
        """Whether bodies of *path* have ``bootstrap_*`` (and the rank fields, where the release has them)."""
        return self.since({"/v1/responses": "0.5.20", "/v1/messages": "0.5.22"}.get(path, "0.4.6"))

    def takes_data_parallel_rank(self, path: str) -> bool:
        """Whether bodies of *path* have ``data_parallel_rank``; from 0.5.10 on a deprecated alias."""
        if path == "/generate":  # the alias was lost in 0.5.15 and was restored in 0.5.18
            return self.since("0.4.7") and not (self.since("0.5.15") and not self.since("0.5.18"))
        if path == "/v1/messages":
            return False
        return self.since("0.5.20" if path == "/v1/responses" else "0.5.7")

    def reads_rank_header(self, path: str) -> bool:
        """Whether *path* reads ``X-Data-Parallel-Rank``."""
        return self.since({"/generate": "99.0.0", "/v1/responses": "0.5.20"}.get(path, "0.5.10"))

    def reads_overrides(self, path: str) -> bool:
        """Whether *path* reads ``x-override-*``, once that is switched on."""
        since = {"/generate": "0.5.15", "/v1/chat/completions": "0.5.18", "/v1/messages": "0.5.18"}
        return self.since(since.get(path, "99.0.0"))

    @property
    def strict_generate(self) -> bool:
        """Whether ``/generate`` refuses values that only look like integers (``api/v1/api_types.py``)."""
        return self.since("0.5.22")

    @property
    def balances(self) -> bool:
        """Whether both sides use ``--load-balance-method`` (PR 16080); before, they followed the room."""
        return self.since("0.5.8")

    @property
    def prefill_always_follows_rooms(self) -> bool:
        """Whether ``--load-balance-method`` is overridden on prefill, as in 0.5.8 and 0.5.9 (``server_args.py``)."""
        return self.balances and not self.since("0.5.10")

    @property
    def checks_room_conflict(self) -> bool:
        """Whether prefill fails a request on another rank than its room implies (``disaggregation/common/conn.py``)."""
        return self.since("0.5.11")

    @property
    def explicit_rank_skips_conflict_check(self) -> bool:
        """Whether that check is skipped if the prefill leg has ``disagg_prefill_dp_rank`` itself (PR 27546)."""
        return self.since("0.5.16")

    @property
    def loses_first_explicit_rank(self) -> bool:
        """Whether the first request of a pair with ``disagg_prefill_dp_rank`` fails (fixed by PR 22990)."""
        return self.routes_by_field and not self.since("0.5.11")

    @property
    def chats_by_ids(self) -> bool:
        """Whether ``input_ids`` of a chat are its prompt."""
        return self.since("0.5.13")

    @property
    def after_disconnect(self) -> Disconnect:
        """What follows when the client of a stream disconnects (``generate_request`` of ``tokenizer_manager.py``).

        0.5.18 lost what 0.5.17 had (``_discard_pending_req_states``); 0.5.20 has it again (PR 35255).
        """
        if not self.since("0.5.17"):
            return Disconnect.ABORTS_LATER
        return Disconnect.RUNS_ON if self.since("0.5.18") and not self.since("0.5.20") else Disconnect.ABORTS

    @property
    def computes_rejected_prompts(self) -> bool:
        """Whether prefill answers 200 for a prompt that its scheduler rejects, and sends the KV cache of one token.

        ``set_finish_with_abort`` puts one token in the prompt's place, and the end of the transfer overwrites the
        verdict (``disaggregation/prefill.py``). Decode then generates from a cache that was never written.
        """
        return not self.since("0.5.20")

    @property
    def kick_starts(self) -> bool:
        """Whether streaming completions and chat hold their headers until the first chunk."""
        return self.since("0.5.10")

    @property
    def checks_page_size(self) -> bool:
        """Whether decode ends itself when prefill has pages of another size (``disaggregation/common/conn.py``)."""
        return self.since("0.5.8")

    @property
    def checks_cache_dtype(self) -> bool:
        """Whether decode ends itself when prefill's ``--kv-cache-dtype`` is another."""
        return self.since("0.5.10")

    @property
    def room_zero_never_arrives(self) -> bool:
        """Whether a metadata row that reads 0 means "not arrived" (``disaggregation/utils.py``)."""
        return self.since("0.5.9")

    @property
    def counts_replicas(self) -> bool:
        """Whether ``/server_info`` has ``dp_size`` 1, ``attn_dp_size`` N with DP attention (``parallel_hook.py``)."""
        return self.since("0.5.22")

    @property
    def has_loads(self) -> bool:
        return self.since("0.5.8")

    @property
    def has_get_load(self) -> bool:
        return self.since("0.4.7") and not self.since("0.5.21")

    @property
    def has_ready(self) -> bool:
        return self.since("0.5.20")

    @property
    def health_reports_draining(self) -> bool:
        """Whether ``/health`` answers 503 after SIGTERM."""
        return self.since("0.4.10")

    @property
    def has_server_info(self) -> bool:
        """Whether it has ``/server_info``, ``/model_info``; before only ``/get_server_info``, ``/get_model_info``."""
        return self.since("0.5.6")
