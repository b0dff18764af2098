"""Pages that can be made to misbehave, for tests of those who read them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from starlette.responses import PlainTextResponse, Response

PAGES: Final = ("loads", "metrics", "server_info", "health", "models")
KINDS: Final = ("ok", "hang", "garbage", "500")

_GARBAGE: Final = b'{"loads": [{"dp_rank": \xff\x00 sglang:num_used_tokens{dp_rank= 1e'


@dataclass(slots=True)
class Faults:
    """The faults that are switched on, by page."""

    active: dict[str, str] = field(default_factory=dict)
    _switched: asyncio.Event = field(default_factory=asyncio.Event)

    def switch(self, wanted: dict[str, str]) -> None:
        """Switch some pages.

        Raises:
            ValueError: There is no such page or kind.
        """
        for page, kind in wanted.items():
            if page not in PAGES or kind not in KINDS:
                raise ValueError(f"{page}: {kind} is not one of {', '.join(PAGES)}: {', '.join(KINDS)}")
        self.active.update(wanted)
        self._switched.set()
        self._switched = asyncio.Event()

    async def answer(self, page: str, healthy: Callable[[], Awaitable[Response]]) -> Response:
        """Answer as *healthy* would, unless a fault is switched on."""
        match self.active.get(page, "ok"):
            case "hang":
                while self.active.get(page) == "hang":
                    await self._switched.wait()
                return PlainTextResponse("was hanging", 503)
            case "garbage":
                return Response(_GARBAGE, media_type="application/json")
            case "500":
                return PlainTextResponse("Internal Server Error", 500)
            case _:
                return await healthy()
