"""An engine whose every answer carries headers that it has no business to send."""

from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dp_extproc.lab.engine.api.app import Server
from dp_extproc.lab.engine.settings import Settings

REQUEST_ID = b"x-request-id"


class LyingServer(Server):
    """The strict stand-in, with further headers on its answers."""

    def __init__(self, settings: Settings, *, kill: Callable[[str], None]) -> None:
        self.lies: dict[str, str] = {}
        self.visits: Counter[str] = Counter()
        """By the request id, which whatever comes through Envoy has."""
        super().__init__(settings, kill=kill)

    def app(self) -> ASGIApp:
        honest = super().app()

        async def lying(scope: Scope, receive: Receive, send: Send) -> None:
            async def add(message: Message) -> None:
                if message["type"] == "http.response.start":
                    lies = [(name.encode(), value.encode()) for name, value in self.lies.items()]
                    message = {**message, "headers": [*message["headers"], *lies]}
                await send(message)

            request_id = dict(scope["headers"]).get(REQUEST_ID) if scope["type"] == "http" else None
            if request_id is not None:
                self.visits[request_id.decode()] += 1
            await honest(scope, receive, add)

        return lying
