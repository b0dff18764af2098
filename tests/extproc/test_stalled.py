"""Answers that begin and do not go on, as the service's own clock sees them."""

import asyncio

import grpc.aio
import pytest
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

from dp_extproc.engines.model import Role
from dp_extproc.extproc.service import ExtProcService
from extproc.wire import Watcher
from fleet_fixtures import Fleet, make_facts
from fuzz.streams import FakeContext
from fuzz.virtual_time import run


def messages(status: int) -> list[ProcessingRequest]:
    """A request, and the head of its answer."""
    head, body, answer = ProcessingRequest(), ProcessingRequest(), ProcessingRequest()
    for name, value in ((":method", b"POST"), (":path", b"/generate")):
        head.request_headers.headers.headers.add(key=name, raw_value=value)
    head.protocol_config.request_body_mode = ProcessingMode.BUFFERED
    body.request_body.body = b'{"text":"hello"}'
    body.request_body.end_of_stream = True
    answer.response_headers.headers.headers.add(key=":status", raw_value=b"%d" % status)
    return [head, body, answer]


@pytest.mark.parametrize("disaggregated", [False, True])
def test_error_is_answered_when_its_text_does_not_arrive(disaggregated: bool) -> None:
    """The client gets an error without the text, also from an aggregated endpoint."""
    if disaggregated:
        fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
    else:
        fleet = Fleet(workers=[make_facts(Role.WORKER)])

    async def story() -> list[ProcessingResponse]:
        clock = asyncio.get_running_loop().time
        service = ExtProcService(fleet.scheduler, (Watcher(),), max_body=1000, clock=clock)
        context = FakeContext({})
        sweeper = asyncio.create_task(service.sweep())
        stream = asyncio.create_task(service.process(None, context))
        for message in messages(500):
            context.incoming.put_nowait(message)
        await asyncio.sleep(10)
        answers = context.answers()
        context.incoming.put_nowait(grpc.aio.EOF)
        await stream
        await asyncio.sleep(60)
        assert not service._registry
        sweeper.cancel()
        return answers

    answers = run(story())

    assert answers[-1].WhichOneof("response") == "immediate_response"
    assert answers[-1].immediate_response.status.code == 502
