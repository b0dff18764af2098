"""Requests in the admission queue, whose streams are read on."""

import asyncio
from collections.abc import Awaitable, Callable

import grpc.aio
import pytest
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest

from dp_extproc.config.reliability import AdmissionSettings, QueueSettings
from dp_extproc.engines.model import Role
from dp_extproc.extproc.service import ExtProcService
from dp_extproc.scheduling.admission import AdmissionQueue
from extproc.wire import Watcher
from fleet_fixtures import Fleet, make_facts
from fuzz.streams import FakeContext
from fuzz.virtual_time import run

MOST_WAITING = 2


class Full:
    """A service whose only rank takes one request at a time, and has one."""

    def __init__(self) -> None:
        clock = asyncio.get_running_loop().time
        fleet = Fleet(workers=[make_facts(Role.WORKER, ranks=1)])
        self.queue = AdmissionQueue(QueueSettings.model_validate({"max_wait": "2s", "max_depth": MOST_WAITING}))
        scheduler = fleet.make_scheduler(clock=clock, queue=self.queue, admission=AdmissionSettings(max_requests=1))
        self.watcher = Watcher()
        self.service = ExtProcService(scheduler, (self.watcher,), queue=self.queue, max_body=1000, clock=clock)

    async def open(self) -> tuple[FakeContext, asyncio.Task[None]]:
        """Open a stream, and send a request on it."""
        context = FakeContext({})
        stream = asyncio.create_task(self.service.process(None, context))
        head, body = ProcessingRequest(), ProcessingRequest()
        for name, value in ((":method", b"POST"), (":path", b"/generate")):
            head.request_headers.headers.headers.add(key=name, raw_value=value)
        head.protocol_config.request_body_mode = ProcessingMode.BUFFERED
        body.request_body.body = b'{"text":"hello"}'
        body.request_body.end_of_stream = True
        context.incoming.put_nowait(head)
        context.incoming.put_nowait(body)
        await settle()
        return context, stream


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def last(context: FakeContext) -> str | None:
    """Name the kind of the last answer."""
    answer = context.answers()[-1]
    status = answer.immediate_response.status.code
    return f"immediate {status}" if status else answer.WhichOneof("response")


async def half_close(context: FakeContext, stream: asyncio.Task[None]) -> None:
    context.incoming.put_nowait(grpc.aio.EOF)
    await stream


async def cancel(_context: FakeContext, stream: asyncio.Task[None]) -> None:
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


def test_queued_request_is_routed_when_the_one_before_it_ends() -> None:
    """The end of a request notifies the queue."""

    async def story() -> None:
        full = Full()
        first, first_stream = await full.open()
        second, second_stream = await full.open()
        assert (last(first), last(second), len(full.queue)) == ("request_body", "request_headers", 1)

        await half_close(first, first_stream)
        await settle()

        assert (last(second), len(full.queue)) == ("request_body", 0)
        await half_close(second, second_stream)
        assert full.watcher.decisions == ["routed", "routed"]

    run(story())


def test_queued_request_is_refused_when_it_has_waited_too_long() -> None:
    """The client gets the refusal that it would have got without a queue."""

    async def story() -> None:
        full = Full()
        await full.open()
        second, _ = await full.open()
        await asyncio.sleep(2.5)

        assert (last(second), len(full.queue)) == ("immediate 429", 0)
        assert full.watcher.decisions == ["routed", "over_capacity"]

    run(story())


def test_request_is_refused_at_once_when_the_queue_is_full() -> None:
    """Its depth bounds how many bodies are kept."""

    async def story() -> None:
        full = Full()
        for _ in range(1 + MOST_WAITING):
            await full.open()
        one_too_many, _ = await full.open()

        assert (last(one_too_many), len(full.queue)) == ("immediate 429", MOST_WAITING)

    run(story())


@pytest.mark.parametrize("end", [half_close, cancel])
def test_queued_request_leaves_the_queue_when_its_client_leaves(
    end: Callable[[FakeContext, asyncio.Task[None]], Awaitable[None]],
) -> None:
    """The stream is read while the request waits, so the request behind it is first at once."""

    async def story() -> None:
        full = Full()
        first, first_stream = await full.open()
        second = await full.open()
        third, _ = await full.open()
        await end(*second)
        assert len(full.queue) == 1
        await half_close(first, first_stream)
        await settle()

        assert (last(third), len(full.queue)) == ("request_body", 0)
        assert full.watcher.decisions == ["routed", "routed"]

    run(story())


def test_queued_request_leaves_the_queue_when_envoy_answers_by_itself() -> None:
    """Such a response passes, and the request is not scheduled any more."""

    async def story() -> None:
        full = Full()
        await full.open()
        second, _ = await full.open()
        answer = ProcessingRequest()
        answer.response_headers.headers.headers.add(key=":status", raw_value=b"504")
        second.incoming.put_nowait(answer)
        await settle()

        assert (last(second), len(full.queue)) == ("response_headers", 0)
        assert full.watcher.decisions == ["routed"]

    run(story())
