"""Fleets that several tests share."""

from collections.abc import Iterator

import pytest

from e2e.stack import Stack, run_stack

VERSIONS = ("0.5.7", "0.5.9", "0.5.10", "0.5.11", "0.5.16", "0.5.23")


@pytest.fixture(scope="module", params=VERSIONS)
def every_version(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A fleet of each release that differs."""
    with run_stack(request.param) as stack:
        yield stack


@pytest.fixture(scope="module", params=["buffered", "full_duplex_streamed"])
def every_mode(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A fleet of the newest release, with Envoy sending bodies in each of the two ways."""
    with run_stack(envoy={"body_mode": request.param, "max_body_bytes": 33 << 20}) as stack:
        yield stack


@pytest.fixture(scope="module")
def newest() -> Iterator[Stack]:
    """A fleet of the newest release."""
    with run_stack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def _forgetful(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let every test begin with engines that remember nothing, and end with empty books."""
    shared = ("every_version", "every_mode", "newest")
    stacks: list[Stack] = [request.getfixturevalue(name) for name in shared if name in request.fixturenames]
    for stack in stacks:
        stack.forget()
    yield
    for stack in stacks:
        stack.service.wait_until_idle()
