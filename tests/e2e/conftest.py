"""Fleets that several end-to-end tests share."""

from collections.abc import Iterator
from typing import Any

import pytest

from e2e.stack import Stack, run_stack

VERSIONS = ("0.5.7", "0.5.9", "0.5.10", "0.5.11", "0.5.16", "0.5.23")


@pytest.fixture(scope="module", params=VERSIONS)
def every_version(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Give a fleet of each SGLang release that behaves differently."""
    with run_stack(request.param) as stack:
        yield stack


@pytest.fixture(scope="module", params=["buffered", "full_duplex_streamed", "buffered, prefill leg of the service"])
def every_mode(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """Give a fleet of the newest release, with each mode of bodies, and each sender of the prefill leg."""
    mode, _, leg = request.param.partition(", ")
    sections: dict[str, Any] = {"prefill_leg": "service"} if leg else {}
    with run_stack(envoy={"body_mode": mode, "max_body_bytes": 33 << 20}, **sections) as stack:
        yield stack


@pytest.fixture(scope="module")
def newest() -> Iterator[Stack]:
    """Give a fleet of the newest release."""
    with run_stack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def _forgetful(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let every test begin with empty request journals of the engines, and end without reservations."""
    shared = ("every_version", "every_mode", "newest")
    stacks: list[Stack] = [request.getfixturevalue(name) for name in shared if name in request.fixturenames]
    for stack in stacks:
        stack.forget()
    yield
    for stack in stacks:
        stack.service.wait_until_idle()
