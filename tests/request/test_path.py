"""Known paths are read, and all others are refused."""

import pytest

from dp_extproc.request.path import Models, Moved, Passed, read_path
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import Api


@pytest.mark.parametrize("path", list(Api))
@pytest.mark.parametrize("query", ["", "?", "?a=1&b=/health"])
def test_inference_path_is_read(path: Api, query: str) -> None:
    """The query does not matter."""
    assert read_path("POST", path + query) is path


def test_generate_takes_put() -> None:
    """SGLang has it so."""
    assert read_path("PUT", "/generate") is Api.GENERATE


@pytest.mark.parametrize(
    ("method", "path", "is_head", "by_model"),
    [
        ("GET", "/health?a=/v1/models", False, False),
        ("HEAD", "/health", True, False),
        ("POST", "/tokenize", False, True),
        ("POST", "/separate_reasoning", False, False),
        ("PUT", "/v1/rerank", False, True),
    ],
)
def test_path_that_any_engine_answers_is_passed(method: str, path: str, is_head: bool, by_model: bool) -> None:
    """Only where the body names the model does the pool depend on it."""
    asked = read_path(method, path)

    assert isinstance(asked, Passed)
    assert (asked.is_head, asked.route.by_model) == (is_head, by_model)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/org/name"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_models_are_answered_here(method: str, path: str) -> None:
    """The query does not count."""
    assert read_path(method, f"{path}?a=1") == Models(path)


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/v1/completions/", "/v1/completions"),
        ("/v1/models/", "/v1/models"),
        ("/v1/responses/?a=/", "/v1/responses?a=/"),
        ("/tokenize/", "/tokenize"),
    ],
)
def test_known_path_with_a_slash_at_its_end_has_moved(path: str, location: str) -> None:
    """FastAPI redirects so."""
    assert read_path("POST", path) == Moved(location)


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        pytest.param("GET", "/generate", 405, Reason.WRONG_METHOD, id="GET of a POST path"),
        pytest.param("PUT", "/v1/completions", 405, Reason.WRONG_METHOD, id="PUT"),
        pytest.param("OPTIONS", "/v1/completions", 405, Reason.WRONG_METHOD, id="OPTIONS"),
        pytest.param("POST", "/health", 405, Reason.WRONG_METHOD, id="POST of a GET path"),
        pytest.param("POST", "/flush_cache", 403, Reason.PATH_REFUSED, id="control"),
        pytest.param("DELETE", "/hicache/storage-backend", 403, Reason.PATH_REFUSED, id="control by DELETE"),
        pytest.param("POST", "/dumper/reset", 403, Reason.PATH_REFUSED, id="control below a path"),
        pytest.param("GET", "/metrics", 404, Reason.PATH_REFUSED, id="page of one engine"),
        pytest.param("GET", "/v1/responses/resp_1", 404, Reason.PATH_REFUSED, id="stored response"),
        pytest.param("POST", "//v1/completions", 404, Reason.UNKNOWN_PATH, id="doubled slash"),
        pytest.param("POST", "/v1/completions//", 404, Reason.UNKNOWN_PATH, id="two slashes at the end"),
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


def test_wrong_method_is_refused_with_the_right_ones() -> None:
    """HTTP asks for them in the ``allow`` header."""
    refusals = [read_path("DELETE", path) for path in ("/generate", "/health")]

    allowed = [refusal.headers for refusal in refusals if isinstance(refusal, Rejection)]
    assert allowed == [(("allow", "POST, PUT"),), (("allow", "GET, HEAD"),)]
