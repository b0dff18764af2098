"""Estimates the prompt tokens of images, sound and video from the JSON text of a member, without decoding all of it.

Only the first bytes of a base64 text are decoded: the header of an image has its width and height. What stands at an
address cannot be seen, and counts as :data:`MEDIA_TOKENS`. The headers of four formats are a page of code; libraries
that read them want a file, and so the whole text decoded. Pure.
"""

import binascii
import re
from typing import Final

from msgspec import Raw

MEDIA_TOKENS: Final = 1024
"""The tokens of an image, sound or video that cannot be seen, such as by its address. Vision models make about one
token of 28 x 28 pixels (Qwen2-VL), so this is the order of magnitude of one image."""
_PATCH: Final = 28
"""Pixels of the side of a square that is one token: ``IMAGE_FACTOR`` of SGLang's ``multimodal/processors/qwen_vl.py``,
where 2 x 2 patches of 14 pixels are merged."""
_LEAST_PATCHES: Final = 4
_MOST_PATCHES: Final = 16_384
"""Bounds of the tokens of an image, to which larger and smaller ones are scaled: ``MIN_PIXELS``, ``MAX_PIXELS``."""
_SOUND_TOKENS_PER_SECOND: Final = 25
"""As of Qwen2-Audio: a token for 40 ms."""
_SOUND_BYTES_PER_SECOND: Final = 16_000
"""Of compressed sound, at 128 kbit/s. WAV states its own rate."""
_VIDEO_BYTES_PER_TOKEN: Final = 1_024
"""1 Mbit/s is 125 kB/s, of which SGLang samples two frames that are merged in time, for some 120 tokens."""
_MOST_VIDEO_TOKENS: Final = 115_200
"""``VIDEO_TOTAL_PIXELS`` by the pixels of a token."""
_MOST_SOUND_TOKENS: Final = 90_000
"""An hour."""

_HEAD_BYTES: Final = 64
"""Bytes that have the size of an image in all formats but JPEG."""
_JPEG_BYTES: Final = 192 << 10
"""Bytes in which the frame header of a JPEG stands, behind thumbnails and colour profiles of 64 kB each."""
_PREFIX_BYTES: Final = 256
"""Bytes in which the prefix of a data URL ends."""
_DATA_URL: Final = re.compile(rb"data:([^,;]*)[^,]*;base64,", re.IGNORECASE)
_ADDRESS: Final = re.compile(rb"(https?|file|s3):|\.|//?(?!/|9j)", re.IGNORECASE)
"""An address or the path of a file. The base64 text of a JPEG begins with ``/9j``, which may be escaped."""
_SOURCE: Final = re.compile(rb'"(?:url|data|image|file_data)"\s*:\s*"')
"""The member of an object that has the media. It is looked up in the first bytes, before the text itself."""
_MOST_MEMBER_BYTES: Final = 1_024
_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
"""Markers of JPEG that a frame header has."""


def image_tokens(member: Raw) -> int:
    """Estimate the tokens of an image: a data URL, base64 alone, an address, or an object that has one of these."""
    text = _text_of(member)
    size = None if text is None else image_size(text)
    return MEDIA_TOKENS if size is None else _patches(*size)


def sound_tokens(member: Raw) -> int:
    """Estimate the tokens of sound by its seconds."""
    text = _text_of(member)
    if text is None:
        return MEDIA_TOKENS
    head = _decode(text, _HEAD_BYTES)
    rate = _SOUND_BYTES_PER_SECOND
    if head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt ":
        rate = int.from_bytes(head[28:32], "little") or rate
    return max(1, min(_MOST_SOUND_TOKENS, len(text) * 3 // 4 * _SOUND_TOKENS_PER_SECOND // rate))


def video_tokens(member: Raw) -> int:
    """Estimate the tokens of a video by its bytes."""
    text = _text_of(member)
    if text is None:
        return MEDIA_TOKENS
    return max(MEDIA_TOKENS, min(_MOST_VIDEO_TOKENS, len(text) * 3 // 4 // _VIDEO_BYTES_PER_TOKEN))


def image_size(text: memoryview) -> tuple[int, int] | None:
    """Read width and height in pixels from the header of an image in base64; None if it is of another format."""
    head = _decode(text, _HEAD_BYTES)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
        return _pair(head[16:24], 4, "big")
    if head[:6] in {b"GIF87a", b"GIF89a"}:
        return _pair(head[6:10], 2, "little")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp(head)
    if head[:2] == b"\xff\xd8":
        return _jpeg(_decode(text, 4096)) or _jpeg(_decode(text, _JPEG_BYTES))
    return None


def _patches(width: int, height: int) -> int:
    if not (width and height):
        return MEDIA_TOKENS
    squares = max(1, round(width / _PATCH)) * max(1, round(height / _PATCH))
    return min(_MOST_PATCHES, max(_LEAST_PATCHES, squares))


def _text_of(member: Raw) -> memoryview | None:
    """Find the base64 text of a member; None if there is none."""
    view = memoryview(member)
    start, kind = 1, bytes(view[:1])
    if kind == b"{":
        found = _SOURCE.search(view[:_MOST_MEMBER_BYTES])
        if found is None:
            return None
        start = found.end()
    elif kind != b'"':
        return None
    head = bytes(view[start : start + _PREFIX_BYTES]).replace(rb"\/", b"//")
    if url := _DATA_URL.match(head):
        start += url.end()
    elif _ADDRESS.match(head):
        return None
    return view[start:-1]


def _decode(text: memoryview, size: int) -> bytes:
    """Decode the first bytes of a base64 text, as far as it is one."""
    part = bytes(text[: -(-size // 3) * 4])
    if b"\\" in part:
        part = part.replace(rb"\/", b"/")
    part = part.split(b'"', 1)[0]
    try:
        return binascii.a2b_base64(part[: len(part) // 4 * 4])
    except binascii.Error:
        return b""


def _pair(data: bytes, size: int, order: str) -> tuple[int, int] | None:
    if len(data) < 2 * size:
        return None
    read = int.from_bytes
    return read(data[:size], order), read(data[size : 2 * size], order)  # type: ignore[arg-type]


def _webp(head: bytes) -> tuple[int, int] | None:
    if len(head) < 30:
        return None
    if head[12:16] == b"VP8 ":
        found = _pair(head[26:30], 2, "little")
        return found and (found[0] & 0x3FFF, found[1] & 0x3FFF)
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _FRAMES:
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            return width, height
        at += 1 if marker == 0xFF else 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return None
