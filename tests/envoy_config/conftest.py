"""One Envoy per body mode in front of a scripted service and two recording engines."""

from collections.abc import Iterator

import pytest

from dp_extproc.config import BodyMode
from envoy_config.harness import Bench, run_bench


@pytest.fixture(scope="module", params=[BodyMode.BUFFERED, BodyMode.FULL_DUPLEX_STREAMED])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with run_bench(request.param) as bench:
        yield bench
