"""An engine whose every response has headers that an engine must not set."""

from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dp_extproc.lab.engine.api.app import Server
from dp_extproc.lab.engine.settings import Settings

REQUEST_ID = b"x-request-id"


class ForgingEngine(Server):
    """The strict engine, with further headers on its responses."""

    def __init__(self, settings: Settings, *, kill: Callable[[str], None]) -> None:
        self.forged_headers: dict[str, str] = {}
        self.visits: Counter[str] = Counter()
        """Number of requests by request id, which every request through Envoy has."""
        super().__init__(settings, kill=kill)

    def app(self) -> ASGIApp:
        honest = super().app()

        async def forging(scope: Scope, receive: Receive, send: Send) -> None:
            async def add(message: Message) -> None:
                if message["type"] == "http.response.start":
                    forged_headers = [(name.encode(), value.encode()) for name, value in self.forged_headers.items()]
                    message = {**message, "headers": [*message["headers"], *forged_headers]}
                await send(message)

            request_id = dict(scope["headers"]).get(REQUEST_ID) if scope["type"] == "http" else None
            if request_id is not None:
                self.visits[request_id.decode()] += 1
            await honest(scope, receive, add)

        return forging
