"""Engines that were built from source, whose version names no release, work like the newest release."""

import json

import pytest

from dp_extproc.lab.testbed import loopback
from e2e.stack import Stack, body_of, run_stack
from patience import wait_for

PATHS = {
    "/generate": {"text": "x", "sampling_params": {"max_new_tokens": 1}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
}


@pytest.mark.parametrize("version", ["0.0.0.dev0", "0.0.0.dev1+g0123abc", None, 5])
def test_engines_built_from_source_serve_requests(version: object) -> None:
    """The service treats them like the newest release: every path is served, and both ranks are named."""
    with run_stack() as stack:
        for engine in (*stack.prefills, *stack.decodes):
            page = loopback.CLIENT.get(f"{engine.url}/server_info").raise_for_status().json()
            text = json.dumps({**page, "version": version})
            engine.fault(server_info={"kind": "text", "text": text}, loads={"kind": "hang", "times": 1})
        wait_for(lambda: _versions(stack) == [None, None], 30)

        for path, body in PATHS.items():
            stack.forget()
            answer = stack.client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            for leg in stack.legs():
                assert {"routed_dp_rank", "disagg_prefill_dp_rank"} <= body_of(leg).keys()
        log = stack.service.log()
        assert [log.count(f"{engine.url}: unknown_version: ") for engine in (*stack.prefills, *stack.decodes)] == [1, 1]


def _versions(stack: Stack) -> list[object]:
    return [each.get("version", "undiscovered") for each in stack.service.loads()["endpoints"]]
