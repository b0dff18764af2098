"""A bus over Redis or Valkey: every replica publishes and subscribes to one channel.

A replica receives its own messages, too. They show that the way through the server works; an open connection does not.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from dp_extproc.background import heed_cancellation
from dp_extproc.sync.transport.bus import Listener, keep_up

_MAX_WAITING: Final = 256
"""Bound on the messages that wait for the server: those of 5 s. A slower server has exceeded the timeout already."""
_AT_ONCE: Final = 64
"""Bound on the messages of one round trip."""


class RedisBus:
    """Sends through a channel of a server. Implements :class:`dp_extproc.sync.transport.bus.Bus`."""

    def __init__(self, url: str, channel: str, patience: float) -> None:
        """Prepare, without connecting.

        Args:
            url: ``redis://[user:password@]host:port`` or ``rediss://...`` with TLS.
            channel: Common to all replicas of a fleet.
            patience: Seconds to wait for the server; longer than the pause between two messages of this replica.
        """
        self.lost = 0
        self.problem: str | None = None
        self._url = url
        self._channel = channel
        self._patience = patience
        self._connected = False
        self._waiting: deque[bytes] = deque()
        self._some_wait = asyncio.Event()

    def send(self, message: bytes) -> None:
        if not self._connected:
            self.lost += 1
            return
        if len(self._waiting) == _MAX_WAITING:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(message)
        self._some_wait.set()

    async def run(self, listener: Listener) -> None:
        await keep_up(lambda: self._session(listener), listener.down)

    async def _session(self, listener: Listener) -> None:
        try:
            async with self._subscribed() as (client, subscription), asyncio.TaskGroup() as tasks:
                tasks.create_task(self._publish(client))
                self._connected = True
                listener.up()
                await self._receive(subscription, listener)
        except* (RedisError, OSError, ValueError) as errors:  # the last of a host name that cannot be one
            raise ConnectionError(_sentence(_first(errors))) from None
        finally:
            self._connected = False
            self.lost += len(self._waiting)  # their moments are relative to now
            self._waiting.clear()

    @contextlib.asynccontextmanager
    async def _subscribed(self) -> AsyncIterator[tuple[Redis, PubSub]]:
        client = Redis.from_url(
            self._url,
            protocol=2,  # every Redis and Valkey speaks it, and pub/sub needs no more
            socket_timeout=self._patience,
            socket_connect_timeout=self._patience,
            retry=Retry(NoBackoff(), 0),  # a connection that is restored by itself would hide lost messages
        )
        subscription = client.pubsub()
        try:
            await subscription.subscribe(self._channel)
            await self._next(subscription)  # the server confirms: all messages from now on arrive
            yield client, subscription
        finally:
            for each in (subscription, client):
                with contextlib.suppress(RedisError, OSError):
                    await each.aclose()

    async def _publish(self, client: Redis) -> None:
        while True:
            await self._some_wait.wait()
            self._some_wait.clear()
            while self._waiting:
                pipeline = client.pipeline(transaction=False)
                messages = [self._waiting.popleft() for _ in range(min(_AT_ONCE, len(self._waiting)))]
                for message in messages:
                    pipeline.publish(self._channel, message)
                try:
                    await pipeline.execute()
                except BaseException:
                    self.lost += len(messages)
                    raise
                heed_cancellation()

    async def _receive(self, subscription: PubSub, listener: Listener) -> None:
        while True:
            message = await self._next(subscription)
            if message["type"] == "message":
                listener.receive(message["data"])

    async def _next(self, subscription: PubSub) -> dict[str, Any]:
        message: dict[str, Any] | None = await subscription.get_message(timeout=self._patience)
        heed_cancellation()
        if message is None:
            raise TimeoutError(f"nothing has come through it for {self._patience:g} s, not even our own messages")
        return message


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _sentence(error: BaseException) -> str:
    """Describe an error. The client's own messages name host and port, but never the password."""
    if isinstance(error, AuthenticationError):
        return f"the server refuses the user or the password of sync.url: {error}"
    if isinstance(error, NoPermissionError):
        return f"the server does not let this user publish and subscribe to the channel: {error}"
    return str(error) or type(error).__name__
