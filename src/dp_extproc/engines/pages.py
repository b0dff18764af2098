"""Decodes the pages of engines: JSON, and of a Prometheus page the few lines about load.

The other lines of a Prometheus page, mostly histograms, never reach the parser.
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
"""Bytes of needed lines; they bound the work of the parser to half a second. Engines print 1 kB per rank."""
_MAX_LINE_BYTES: Final = 2048
_RANK: Final = re.compile(r"[0-9]{1,6}")


ABSENT: Final = frozenset({404, 405})
FACTS_PATIENCE: Final = 3.0
"""Multiple of ``load.timeout`` for pages of facts. ``/server_info`` waits for the next step of the schedulers;
``/v1/loads`` does not."""


class ReaderError(Exception):
    """A page of an engine cannot be read: there is no complete one, or it is not what it should be."""

    def __init__(self, kind: FailureKind, message: str, status: int | None = None) -> None:
        self.kind = kind
        self.status = status
        super().__init__(message)

    @property
    def is_absent(self) -> bool:
        """Whether the engine answered that it has no such page."""
        return self.status in ABSENT


class EngineHttp(Protocol):
    """The HTTP port of one engine. It is handed to adapters, which do no I/O of their own."""

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
    """Make the error for a well-formed page that is not the expected one."""
    return ReaderError(FailureKind.WRONG_SHAPE, message)


def unreadable(message: str) -> ReaderError:
    """Make the error for a malformed page."""
    return ReaderError(FailureKind.UNREADABLE, message)


def read_json(page: bytes, shape: type[Shape], name: str, *, of: str = "SGLang") -> Shape:
    """Decode a page.

    Args:
        page: Its bytes.
        shape: The type to decode it to.
        name: Its name in messages.
        of: The kind of engine that prints such pages, for messages.

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
    """Return the lines of a page that match.

    Raises:
        ReaderError: The lines are too many or too long, or they are not text.
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
    """Parse lines. Their values are unchecked: :mod:`dp_extproc.engines.quantities` checks them.

    Raises:
        ReaderError: The lines are not Prometheus text.
    """
    try:
        families = list(text_string_to_metric_families("\n".join(lines)))
    except (ValueError, LookupError, TypeError) as error:  # the parser raises all of these on malformed lines
        raise unreadable(f"/metrics is not Prometheus text: {error}") from None
    for family in families:
        yield from family.samples


def rank_of(sample: Sample, label: str) -> int:
    """Read the rank from a label. Without the label it is 0.

    Raises:
        ReaderError: The label is not a number.
    """
    text = sample.labels.get(label, "0")
    if not _RANK.fullmatch(text):
        raise wrong_shape(f"/metrics has {label}={text[:20]!r} on {sample.name}")
    return int(text)
