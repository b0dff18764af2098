"""Known paths are read, and all others are refused."""

import pytest

from dp_extproc.request.path import INFERENCE, LOOKUPS, Api, Lookup, read_path
from dp_extproc.request.rejection import Reason, Rejection


@pytest.mark.parametrize("path", list(INFERENCE))
@pytest.mark.parametrize("query", ["", "?", "?a=1&b=/health"])
def test_inference_path_is_read(path: str, query: str) -> None:
    """The query does not matter."""
    assert read_path("POST", path + query) is Api(path)


@pytest.mark.parametrize(("path", "lookup"), [*LOOKUPS.items(), ("/v1/models/org/name", Lookup.MODELS)])
def test_lookup_path_is_read(path: str, lookup: Lookup) -> None:
    """A lookup is a GET without a body."""
    assert read_path("GET", path) is lookup


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        pytest.param("GET", "/generate", 405, Reason.WRONG_METHOD, id="GET of a POST path"),
        pytest.param("PUT", "/generate", 405, Reason.WRONG_METHOD, id="PUT"),
        pytest.param("OPTIONS", "/v1/completions", 405, Reason.WRONG_METHOD, id="OPTIONS"),
        pytest.param("HEAD", "/health", 405, Reason.WRONG_METHOD, id="HEAD"),
        pytest.param("POST", "/health", 405, Reason.WRONG_METHOD, id="POST of a GET path"),
        pytest.param("POST", "/v1/score", 400, Reason.CANNOT_CARRY_ROUTING, id="score"),
        pytest.param("POST", "/v1/embeddings?x", 400, Reason.CANNOT_CARRY_ROUTING, id="embeddings"),
        pytest.param("POST", "/v1/completions/", 404, Reason.UNKNOWN_PATH, id="slash at the end"),
        pytest.param("POST", "//v1/completions", 404, Reason.UNKNOWN_PATH, id="doubled slash"),
        pytest.param("POST", "/v1/%63ompletions", 404, Reason.UNKNOWN_PATH, id="escaped letter"),
        pytest.param("POST", "/v1/../generate", 404, Reason.UNKNOWN_PATH, id="dots"),
        pytest.param("POST", "/V1/completions", 404, Reason.UNKNOWN_PATH, id="upper case"),
        pytest.param("POST", "/generate;a=b", 404, Reason.UNKNOWN_PATH, id="parameters"),
        pytest.param("POST", "", 404, Reason.UNKNOWN_PATH, id="empty"),
        pytest.param("", "/generate", 405, Reason.WRONG_METHOD, id="no method"),
    ],
)
def test_unknown_path_or_method_is_refused(method: str, path: str, status: int, reason: Reason) -> None:
    """Only exact paths are accepted."""
    refusal = read_path(method, path)

    assert isinstance(refusal, Rejection)
    assert (refusal.status, refusal.reason) == (status, reason)


def test_wrong_method_is_refused_with_the_right_one() -> None:
    """HTTP asks for it in the ``allow`` header."""
    refusal = read_path("GET", "/generate")

    assert isinstance(refusal, Rejection)
    assert refusal.headers == (("allow", "POST"),)
