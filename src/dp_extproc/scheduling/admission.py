"""How much a rank may have on its books, and whether a prompt can ever fit.

With prefill/decode disaggregation SGLang itself refuses nothing, however long its queues are, so this is the only
admission control there is.
"""

from collections.abc import Iterable, Sequence

from dp_extproc.config.reliability import AdmissionSettings
from dp_extproc.load.endpoint import EndpointLoad
from dp_extproc.load.step_group import RankLoad
from dp_extproc.request.prompt import Prompt

_CERTAIN = 4
"""A prompt that is estimated so many times longer than what fits is too long for certain: no text is misjudged more."""


class Admission:
    """The limits of one pool's ranks."""

    __slots__ = ("_settings", "is_off")

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        limits = (settings.max_token_ratio, settings.max_request_ratio, settings.max_tokens, settings.max_requests)
        self.is_off = all(limit is None for limit in limits)

    def has_room(self, host: EndpointLoad, rank: int | None, tokens: float, requests: float) -> bool:
        """Tell whether a rank takes a request; without a rank, whether any rank of the host does."""
        if self.is_off:
            return True
        if rank is not None:
            return self.fits(host.ranks[rank], tokens, requests)
        return any(self.fits(each, tokens, requests) for each in host.candidate.ranks)

    def fits(self, rank: RankLoad, tokens: float, requests: float) -> bool:
        """Tell whether this very rank takes a request."""
        if not rank.open and not rank.others_requests:
            return True  # whatever does not fit here fits nowhere
        settings, sample = self._settings, rank.sample
        load = rank.tokens + tokens
        count = rank.own_requests + rank.others_requests + requests
        if settings.max_tokens is not None and load > settings.max_tokens:
            return False
        if settings.max_requests is not None and count > settings.max_requests:
            return False
        if sample is None:
            return True
        capacity, running = sample.capacity_tokens, sample.max_running_requests
        if settings.max_token_ratio is not None and capacity and load > settings.max_token_ratio * capacity:
            return False
        return settings.max_request_ratio is None or not running or count <= settings.max_request_ratio * running


def largest_capacity(hosts: Sequence[EndpointLoad]) -> int | None:
    """Give the KV cache of the largest rank, in tokens; None if any server does not tell."""
    largest = 0
    for host in hosts:
        for rank in host.ranks:
            if rank.sample is None or not rank.sample.capacity_tokens:
                return None
            largest = max(largest, rank.sample.capacity_tokens)
    return largest or None


def may_hold(hosts: Iterable[EndpointLoad], tokens: float) -> bool:
    """Tell whether some rank can hold so many tokens, or does not tell; as a rule the first one is enough."""
    return any(
        rank.sample is None or not rank.sample.capacity_tokens or tokens <= rank.sample.capacity_tokens
        for host in hosts
        for rank in host.ranks
    )


def is_too_long(prompt: Prompt, estimate: float, capacity: int) -> bool:
    """Tell whether a single prompt can fit on no rank for certain; a batch is spread over time, so it can."""
    return least_tokens(prompt, estimate) > capacity


def least_tokens(prompt: Prompt, estimate: float) -> float:
    """Give what a rank has to hold at one time for a prompt, for certain."""
    return 0.0 if prompt.batch is not None and prompt.batch > 1 else max(prompt.tokens, estimate / _CERTAIN)
