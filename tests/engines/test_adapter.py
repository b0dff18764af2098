"""Which kind an engine is of, where the configuration leaves that open. Pages come from a dictionary."""

import asyncio
import json

import pytest

from dp_extproc.config.pools import EngineKind
from dp_extproc.engines.adapter import assumed_facts, read_facts
from dp_extproc.engines.listener import FailureKind
from dp_extproc.engines.model import Endpoint, EngineFacts, Kind, Role
from dp_extproc.engines.pages import ReaderError

SGLANG = {"/server_info": json.dumps({"version": "0.5.23", "dp_size": 2}).encode()}
OLD_SGLANG = {"/get_server_info": SGLANG["/server_info"]}
VLLM = {
    "/version": b'{"version": "0.11.0"}',
    "/v1/models": b'{"data": [{"id": "m"}]}',
    "/metrics": b'vllm:num_requests_running{engine="0"} 1\n',
}
Pages = dict[str, bytes | FailureKind]


class Http:
    """An engine whose pages are written down; a failure kind stands for a page that cannot be read."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.asked: list[str] = []

    async def get(self, path: str, *, patience: float = 1.0, hint: str = "") -> bytes:
        self.asked.append(path)
        page = self.pages.get(path)
        if page is None:
            raise ReaderError(FailureKind.HTTP_STATUS, path, 404)
        if isinstance(page, FailureKind):
            raise ReaderError(page, path)
        return page

    async def post(
        self, path: str, body: bytes, header: tuple[str, str], *, patience: float = 1.0
    ) -> tuple[int, bytes] | None:
        return None


def endpoint(engine: EngineKind = EngineKind.AUTO, dp_size: int | None = None) -> Endpoint:
    return Endpoint("http://h:1", "h", 1, "m", Role.WORKER, dp_size=dp_size, engine=engine)


def facts(pages: Pages, engine: EngineKind = EngineKind.AUTO) -> EngineFacts:
    return asyncio.run(read_facts(Http(pages), endpoint(engine)))


@pytest.mark.parametrize(
    ("pages", "engine", "kind"),
    [
        pytest.param(SGLANG, EngineKind.AUTO, Kind.SGLANG, id="SGLang"),
        pytest.param(OLD_SGLANG, EngineKind.AUTO, Kind.SGLANG, id="SGLang, the page's old name"),
        pytest.param(VLLM, EngineKind.AUTO, Kind.VLLM, id="vLLM"),
        pytest.param(VLLM, EngineKind.VLLM, Kind.VLLM, id="vLLM as configured"),
        pytest.param({**VLLM, "/server_info": b"{}"}, EngineKind.AUTO, Kind.VLLM, id="vLLM with a page of that name"),
    ],
)
def test_an_engine_is_of_the_kind_whose_pages_it_has(pages: Pages, engine: EngineKind, kind: Kind) -> None:
    """SGLang is tried first; a page that is absent, or of another shape, leads to the next kind."""
    assert facts(pages, engine).kind is kind


@pytest.mark.parametrize(
    ("pages", "engine", "kind", "path"),
    [
        pytest.param({}, EngineKind.AUTO, FailureKind.HTTP_STATUS, "/get_server_info", id="no pages at all"),
        pytest.param(
            {"/server_info": FailureKind.TIMEOUT, **VLLM},
            EngineKind.AUTO,
            FailureKind.TIMEOUT,
            "/server_info",
            id="slow",
        ),
        pytest.param(
            {"/server_info": b"{}"}, EngineKind.AUTO, FailureKind.WRONG_SHAPE, "/server_info", id="another program"
        ),
        pytest.param(
            {**VLLM, "/metrics": FailureKind.TIMEOUT}, EngineKind.AUTO, FailureKind.TIMEOUT, "/metrics", id="vLLM, slow"
        ),
        pytest.param(
            VLLM, EngineKind.SGLANG, FailureKind.HTTP_STATUS, "/get_server_info", id="another one as configured"
        ),
    ],
)
def test_the_failure_of_the_likeliest_kind_is_reported(
    pages: Pages, engine: EngineKind, kind: FailureKind, path: str
) -> None:
    """It is the first kind's, unless the engine has pages of another kind."""
    with pytest.raises(ReaderError, match=path) as failure:
        facts(pages, engine)
    assert failure.value.kind is kind


@pytest.mark.parametrize(("engine", "kind"), [(EngineKind.AUTO, Kind.SGLANG), (EngineKind.VLLM, Kind.VLLM)])
def test_facts_are_assumed_where_the_number_of_ranks_is_configured(engine: EngineKind, kind: Kind) -> None:
    """An engine of unknown kind is taken for SGLang of the newest release."""
    found = assumed_facts(endpoint(engine, dp_size=4))

    assert found is not None
    assert (found.kind, found.dp_ranks, found.version) == (kind, 4, None)
    assert assumed_facts(endpoint(engine)) is None
