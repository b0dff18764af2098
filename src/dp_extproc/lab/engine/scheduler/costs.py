"""Compute what a step costs, in seconds of an unscaled engine."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost model. The defaults are of the order of a large mixture-of-experts model on one H200 node.

    Ranks that share their steps (DP attention) all pay for the step, tokens or not. A prefill step costs
    ``prefill_step + prefill_token * (lockstep_share * max(x) + (1 - lockstep_share) * mean(x))`` where ``x`` are the
    tokens per rank: attention runs on each rank's own rows, so the fullest rank decides; experts run on the gathered
    rows, so their sum does. A decode step costs ``decode_step + decode_request * max(b) + decode_token * max(k)``:
    batches are padded to the largest, and attention reads each rank's own context of ``k`` tokens.
    """

    prefill_step: float = 0.010
    prefill_token: float = 20e-6
    lockstep_share: float = 0.75
    decode_step: float = 0.010
    decode_request: float = 50e-6
    decode_token: float = 50e-9
    transfer: float = 0.002
    """Seconds of the KV cache's way from prefill to decode, whatever its size."""
    transfer_token: float = 1e-6

    def prefill_seconds(self, tokens: Sequence[int]) -> float:
        """Return the cost of computing *tokens* prompt tokens, one number per rank of the group."""
        share = self.lockstep_share
        return self.prefill_step + self.prefill_token * (share * max(tokens) + (1 - share) * sum(tokens) / len(tokens))

    def decode_seconds(self, requests: Sequence[int], context: Sequence[int]) -> float:
        """Return the cost of one output token for *requests* sequences with *context* tokens, per rank of the group."""
        return self.decode_step + self.decode_request * max(requests) + self.decode_token * max(context)

    def own_seconds(self, tokens: int, requests: int, context: int) -> float:
        """Return what a rank's own part of a step would cost alone, without what all ranks pay."""
        return self.prefill_token * tokens + self.decode_request * requests + self.decode_token * context

    def transfer_seconds(self, tokens: int) -> float:
        """Return the time that the KV cache of *tokens* tokens is on its way."""
        return self.transfer + self.transfer_token * tokens
