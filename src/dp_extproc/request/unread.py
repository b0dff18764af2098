"""A request whose body goes from the client to the engines without being seen."""

from typing import Final

from dp_extproc.request.body import InferenceRequest
from dp_extproc.request.members import JsonObject
from dp_extproc.request.path import Api
from dp_extproc.request.prompt import Prompt

UNKNOWN_BYTES: Final = 4096
"""Taken for a body that does not say how long it is: about a thousand tokens, an ordinary prompt."""

_NOTHING: Final = JsonObject(b"{}")


def unread_request(api: Api, length: int | None) -> InferenceRequest:
    """Make do with what a request's head tells.

    Args:
        api: What the path asked for.
        length: Bytes of the body, by its ``content-length``; all of it is taken for prompt.
    """
    return InferenceRequest(
        api=api,
        body=_NOTHING,
        model=None,
        stream=None,
        prompt=Prompt(UNKNOWN_BYTES if length is None else length, 0, None),
        max_tokens=None,
        samples=1,
        routed_rank_pin=None,
        prefill_rank_pin=None,
        is_read=False,
    )
