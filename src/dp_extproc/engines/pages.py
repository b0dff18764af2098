"""Decoding of the pages that engines print: one error, JSON, and the few lines of a Prometheus page that tell load.

All other lines of a Prometheus page, mostly histograms, never reach the parser.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final, Protocol, TypeVar

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from dp_extproc.engines.listener import FailureKind

Shape = TypeVar("Shape")

METRICS_PAGE: Final = "/metrics"
_MAX_BYTES: Final = 1 << 20
"""Of needed lines; bounds the parser's work to half a second. Real servers print 8 lines of 130 bytes per rank."""
_MAX_LINE_BYTES: Final = 2048
_RANK: Final = re.compile(r"[0-9]{1,6}")


ABSENT: Final = frozenset({404, 405})
FACTS_PATIENCE: Final = 3.0
"""/server_info waits for the schedulers' next step, /v1/loads does not: it may take this many times as long."""


class ReaderError(Exception):
    """A page of an engine cannot be had or used."""

    def __init__(self, kind: FailureKind, message: str, status: int | None = None) -> None:
        self.kind = kind
        self.status = status
        super().__init__(message)

    @property
    def is_absent(self) -> bool:
        """Whether the engine is there, but has no such page."""
        return self.status in ABSENT


class EngineHttp(Protocol):
    """One engine over HTTP. It is handed to adapters, which do no I/O of their own."""

    async def get(self, path: str, *, patience: float = 1.0, hint: str = ...) -> bytes:
        """Get a page.

        Args:
            path: Its path on the engine.
            patience: The multiple of ``load.timeout`` within which the page has to be complete.
            hint: For the message of the error if the engine has no such page: what an operator should do.

        Raises:
            ReaderError: There is no complete page.
        """

    async def post(
        self, path: str, body: bytes, header: tuple[str, str], *, patience: float = 1.0
    ) -> tuple[int, bytes] | None:
        """Post JSON with one more header.

        Returns:
            Status and body of the answer; None if there is no complete one.
        """


def wrong_shape(message: str) -> ReaderError:
    """Make the error for a page that is well-formed but not SGLang's."""
    return ReaderError(FailureKind.WRONG_SHAPE, message)


def unreadable(message: str) -> ReaderError:
    """Make the error for a page that is not even well-formed."""
    return ReaderError(FailureKind.UNREADABLE, message)


def read_json(page: bytes, shape: type[Shape], name: str, *, of: str = "SGLang") -> Shape:
    """Decode *page*, which is called *name* in messages, as *shape*. It should be of this kind of engine.

    Raises:
        ReaderError: It is not JSON, or not of that shape.
    """
    try:
        return msgspec.json.decode(page, type=shape)
    except msgspec.ValidationError as error:
        raise wrong_shape(f"{name} is not {of}'s: {error}") from None
    except (ValueError, RecursionError) as error:  # DecodeError and UnicodeDecodeError are ValueErrors
        raise unreadable(f"{name} is not JSON: {error}") from None


def needed_lines(page: bytes, needed: re.Pattern[bytes]) -> list[str]:
    """Find the lines of a page that match.

    Raises:
        ReaderError: They are too many, too long, or no text.
    """
    lines: list[str] = []
    size = 0
    for match in needed.finditer(page):
        line = match[0]
        if len(line) > _MAX_LINE_BYTES:
            raise wrong_shape(f"/metrics has a line of {len(line)} bytes: {line[:60]!r}...")
        size += len(line)
        if size > _MAX_BYTES:
            raise wrong_shape(f"/metrics has more than {_MAX_BYTES} bytes about load")
        try:
            lines.append(line.decode())
        except UnicodeDecodeError:
            raise unreadable(f"/metrics has a line that is not UTF-8: {line[:60]!r}...") from None
    return lines


def parse_samples(lines: Iterable[str]) -> Iterator[Sample]:
    """Parse lines. Their values are any numbers; :mod:`dp_extproc.engines.quantities` is to check them.

    Raises:
        ReaderError: They are not Prometheus text.
    """
    try:
        families = list(text_string_to_metric_families("\n".join(lines)))
    except (ValueError, LookupError, TypeError) as error:  # what the parser raises on lines it did not foresee
        raise unreadable(f"/metrics is not Prometheus text: {error}") from None
    for family in families:
        yield from family.samples


def rank_of(sample: Sample, label: str) -> int:
    """Read the rank from a label; without one it is 0.

    Raises:
        ReaderError: The label is no number.
    """
    text = sample.labels.get(label, "0")
    if not _RANK.fullmatch(text):
        raise wrong_shape(f"/metrics has {label}={text[:20]!r} on {sample.name}")
    return int(text)
