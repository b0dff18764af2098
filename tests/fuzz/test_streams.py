"""Whatever comes on ext_proc streams, in any order: nothing escapes, nothing stays, nothing is said twice."""

import asyncio
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.config.reliability import Supervise, SupervisionSettings
from dp_extproc.engines.model import Role
from dp_extproc.response.first_event import FirstEventReader
from extproc.wire import METHOD, Server, request_headers, run_server
from fleet_fixtures import Fleet, make_facts
from fuzz.effort import examples
from fuzz.streams import MESSAGES, SCRIPTS, End, Say, Stage, Wait
from fuzz.virtual_time import run


async def _play(script: list[Say | End | Wait], mode: Supervise) -> None:
    stage = Stage.build(SupervisionSettings(mode=mode))
    sweeper = asyncio.ensure_future(stage.service.sweep())
    for step in script:
        await stage.play(step)
        assert not sweeper.done(), sweeper.exception()
    await stage.finish()

    for stream in stage.streams:
        assert stream.task.done(), "a stream whose other side has gone is still served"
        if not stream.task.cancelled() and (error := stream.task.exception()) is not None:
            assert isinstance(error, grpc.aio.AbortError), error
        _judge(stream.context.answers(), stream.said)
    assert not stage.service._registry
    assert len(stage.queue) == 0
    for host in stage.fleet.load.by_url.values():
        assert all(not rank.open for rank in host.ranks)
        assert sum(rank.tokens for rank in host.ranks) == 0
    sweeper.cancel()


def _judge(answers: list[object], said: int) -> None:
    """Hold the answers of a stream to the protocol."""
    kinds = [answer.WhichOneof("response") for answer in answers]  # type: ignore[attr-defined]
    if "immediate_response" in kinds:
        assert kinds.index("immediate_response") == len(kinds) - 1, "nothing may follow an immediate response"
    extensions = kinds.count(None)
    assert extensions <= 1
    assert len(kinds) - extensions <= 2 * said, "more answers than questions"


@examples(100)
@given(SCRIPTS, st.sampled_from(Supervise))
def test_service_survives_any_script(script: list[Say | End | Wait], mode: Supervise) -> None:
    """Messages of several requests in any order, cut at any moment: no error escapes, and no reservation stays."""
    run(_play(script, mode))


@examples(200)
@given(st.lists(st.binary(max_size=12) | st.sampled_from([
    b'data: {"text":"a"}\n\n', b'data: {"error":{"code":500}}\r\n\r\n', b"data: [DONE]\n\n", b"event: error\r\n",
    b": x\n\n", b'data: {"type":"message_start"}\n\n', b'data: {"type":"error","error":{"type":"x"}}\n\n',
]), max_size=5), st.data())  # fmt: skip
def test_first_event_does_not_depend_on_how_a_stream_is_cut(parts: list[bytes], data: st.DataObject) -> None:
    """What the first event of a stream is does not depend on how the network cuts it."""
    text = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    whole, cut = FirstEventReader(), FirstEventReader()
    whole.feed(text, end_of_stream=True)
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        cut.feed(text[start:end], end_of_stream=end == len(text) and start == (cuts[-1] if cuts else 0))
    assert cut.error == whole.error


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    fleet = Fleet(prefills=[make_facts(Role.PREFILL)], decodes=[make_facts(Role.DECODE)])
    with run_server(fleet.scheduler) as server:
        yield server


@examples(60)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.tuples(MESSAGES, st.integers(0, 60), st.binary(max_size=3)).map(
            lambda each: each[0].SerializeToString()[: each[1]] + each[2] + each[0].SerializeToString()[each[1] + 3 :]
        ),
        max_size=4,
    )
)
def test_service_survives_any_bytes(server: Server, messages: list[bytes]) -> None:
    """Bytes that are no message end their own stream, and no other."""
    call = server.channel.stream_stream(METHOD, None, None)(iter(messages), timeout=10)
    try:
        assert len(list(call)) <= 2 * len(messages)
    except grpc.RpcError as ended:
        assert ended.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT}  # noqa: PT017
    stream = server.stream()
    assert stream.ask(request_headers()).request_headers is not None
    stream.close()
