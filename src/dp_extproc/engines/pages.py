"""What all adapters need to read pages: the HTTP port of an engine, its error, decoders of JSON and Prometheus text.

Only the few lines about load of a Prometheus page reach the parser; most others are histograms.
"""

import re
from collections.abc import Iterable
from typing import Final, Protocol, TypeVar

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from dp_extproc.engines.listener import FailureKind

Shape = TypeVar("Shape")

METRICS_PAGE: Final = "/metrics"
ABSENT: Final = frozenset({404, 405})
"""Statuses of an engine that has no such page."""
FACTS_PATIENCE: Final = 3.0
"""Multiple of ``load.timeout`` for pages of facts. ``/server_info`` waits for the next step of the schedulers;
``/v1/loads`` does not."""
_MAX_BYTES: Final = 1 << 20
"""Bytes of needed lines; they bound the work of the parser to half a second. Engines print 1 kB per rank."""
_MAX_LINE_BYTES: Final = 2048
"""Bytes of one needed line, with all of its labels; lines of engines have some hundred."""
_RANK: Final = re.compile(r"[0-9]{1,6}")


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
        """Get a page, or raise :class:`ReaderError` if it is not complete within *patience* times ``load.timeout``.

        The error has the *hint* for operators if the engine has no such page.
        """

    async def post(
        self, path: str, body: bytes, header: tuple[str, str], *, patience: float = 1.0
    ) -> tuple[int, bytes] | None:
        """Post JSON with one more header. Returns status and body of the answer; None if there is no complete one."""


def wrong_shape(message: str) -> ReaderError:
    return ReaderError(FailureKind.WRONG_SHAPE, message)


def unreadable(message: str) -> ReaderError:
    return ReaderError(FailureKind.UNREADABLE, message)


def read_json(page: bytes, shape: type[Shape], name: str, *, of: str = "SGLang") -> Shape:
    """Decode a page, or raise :class:`ReaderError` with its *name* and the kind *of* engine that prints such pages."""
    try:
        return msgspec.json.decode(page, type=shape)
    except msgspec.ValidationError as error:
        raise wrong_shape(f"{name} is not {of}'s: {error}") from None
    except (ValueError, RecursionError) as error:  # DecodeError and UnicodeDecodeError are ValueErrors
        raise unreadable(f"{name} is not JSON: {error}") from None


def lines_of(program: str, names: Iterable[str]) -> re.Pattern[bytes]:
    """Make the pattern of the lines of some series. Some collectors replace the colon by an underscore."""
    return re.compile(rb"^%b[:_](?:%b)[{ \t][^\n]*" % (program.encode(), "|".join(names).encode()), re.MULTILINE)


def read_samples(page: bytes, needed: re.Pattern[bytes]) -> list[Sample]:
    """Parse the lines of a Prometheus page that match, or raise :class:`ReaderError`.

    Their values are unchecked: :mod:`dp_extproc.engines.quantities` checks them.
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
    try:
        return [sample for family in text_string_to_metric_families("\n".join(lines)) for sample in family.samples]
    except (ValueError, LookupError, TypeError) as error:  # the parser raises all of these on malformed lines
        raise unreadable(f"/metrics is not Prometheus text: {error}") from None


def rank_of(sample: Sample, label: str) -> int:
    """Read the rank from a label, or raise :class:`ReaderError`. Without the label it is 0."""
    text = sample.labels.get(label, "0")
    if not _RANK.fullmatch(text):
        raise wrong_shape(f"/metrics has {label}={text[:20]!r} on {sample.name}")
    return int(text)
