"""Refusals of a rank, which are no fault of the client."""

import json

import pytest

from dp_extproc.engines.refusals import WrongRank, wrong_rank

RANGE = "routed_dp_rank=7 out of range [0, 4)"
INACTIVE = "DP rank 3 is not active."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param({"error": {"message": RANGE}}, WrongRank.OUT_OF_RANGE, id="/generate"),
        pytest.param({"object": "error", "message": RANGE, "code": 400}, WrongRank.OUT_OF_RANGE, id="OpenAI"),
        pytest.param({"type": "error", "error": {"message": RANGE}}, WrongRank.OUT_OF_RANGE, id="/v1/messages"),
        pytest.param(
            {"error": {"message": "data_parallel_rank 5 is out of range [0, 2)."}}, WrongRank.OUT_OF_RANGE, id="vLLM"
        ),
        pytest.param({"error": {"message": INACTIVE}}, WrongRank.INACTIVE, id="inactive"),
        pytest.param({"error": INACTIVE}, WrongRank.INACTIVE, id="error without members"),
        pytest.param({"message": f"stop {RANGE!r} is no list"}, None, id="quoted from the request"),
        pytest.param({"message": RANGE + "x" * 5000}, None, id="long"),
        pytest.param({"message": [RANGE]}, None, id="of another type"),
        pytest.param([RANGE], None, id="no object"),
    ],
)
def test_a_refused_rank_is_recognised_by_its_whole_message(answer: object, expected: WrongRank | None) -> None:
    """A client that could feign it would take engines out of service."""
    assert wrong_rank(json.dumps(answer).encode()) is expected


@pytest.mark.parametrize("text", [b"", b"oops", b"[" * 4000, b'{"message":"\xff"}', RANGE.encode()])
def test_an_answer_that_is_no_json_is_no_refusal_of_a_rank(text: bytes) -> None:
    """Whatever it is, it raises nothing."""
    assert wrong_rank(text) is None
