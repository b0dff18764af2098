"""Sizes of images, sound and video, read from the first bytes of their base64 text."""

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import Raw

from dp_extproc.request.media import MEDIA_TOKENS, image_tokens, sound_tokens, video_tokens

PAYLOAD = bytes(range(256)) * 64


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + PAYLOAD


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + PAYLOAD


def jpeg(width: int, height: int, before: int = 100) -> bytes:
    application = b"\xff\xe1" + struct.pack(">H", before) + b"\0" * (before - 2)
    return b"\xff\xd8" + application + b"\xff\xff\xc2" + struct.pack(">HBHH", 17, 8, height, width) + PAYLOAD


def webp(chunk: bytes, data: bytes) -> bytes:
    return b"RIFF\0\0\0\0WEBP" + chunk + b"\0\0\0\0" + data + PAYLOAD


IMAGES = {
    "png": png(280, 560),
    "gif": gif(280, 560),
    "jpeg": jpeg(280, 560),
    "jpeg behind a thumbnail": jpeg(280, 560, 65_000),
    "webp lossy": webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 280, 560)),
    "webp lossless": webp(b"VP8L", b"\x2f" + struct.pack("<I", 279 | 559 << 14)),
    "webp extended": webp(b"VP8X", b"\0\0\0\0" + (279).to_bytes(3, "little") + (559).to_bytes(3, "little")),
}


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def raw(value: Any) -> Raw:
    return Raw(json.dumps(value).encode())


FORMS: dict[str, Callable[[str], Any]] = {
    "data URL": lambda text: f"data:image/png;base64,{text}",
    "base64 alone": lambda text: text,
    "object with a URL": lambda text: {"detail": "high", "url": f"data:;BASE64,{text}"},
    "source of /v1/messages": lambda text: {"type": "base64", "media_type": "image/jpeg", "data": text},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_image_counts_a_token_for_each_square(image: bytes, form: Callable[[str], Any]) -> None:
    """280 by 560 pixels are 10 by 20 squares of 28 pixels, also where slashes are escaped."""
    member = raw(form(text_of(image)))

    assert image_tokens(member) == 200
    assert image_tokens(Raw(bytes(member).replace(b"/", rb"\/"))) == 200


@pytest.mark.parametrize(("size", "tokens"), [((1, 1), 4), ((100_000, 100_000), 16_384), ((0, 5), MEDIA_TOKENS)])
def test_size_of_an_image_is_bounded(size: tuple[int, int], tokens: int) -> None:
    """Engines scale images that are too small or too large."""
    assert image_tokens(raw(text_of(png(*size)))) == tokens


UNSEEN: list[Any] = (
    [
        "https://a/b.png",
        "/tmp/a.png",
        "./a.png",
        "file:///a",
        "",
        "%%%",
        "é",
        {"url": "https://a"},
        {"x": 1},
        {},
        5,
        None,
    ]
    + [
        {"type": "file", "file_id": "f"},
        "data:image/png;base64,",
        "data:image/svg+xml;base64,PHN2Zz4=",
        text_of(PAYLOAD),
    ]
    + [text_of(image[:length]) for image in IMAGES.values() for length in (2, 9)]
)


@pytest.mark.parametrize("value", UNSEEN, ids=map(str, range(len(UNSEEN))))
def test_image_that_cannot_be_seen_counts_as_usual(value: object) -> None:
    """Addresses, other formats and what is cut off have the default."""
    assert image_tokens(raw(value)) == MEDIA_TOKENS
    assert image_tokens(Raw(b"")) == MEDIA_TOKENS


def test_sound_counts_its_seconds() -> None:
    """WAV states its bytes per second; other formats are taken for 128 kbit/s."""
    wav = b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16) + bytes(320_000)

    assert sound_tokens(raw({"format": "wav", "data": text_of(wav)})) == pytest.approx(250, abs=2)
    assert sound_tokens(raw({"data": text_of(b"ID3" + bytes(160_000))})) == pytest.approx(250, abs=2)
    assert sound_tokens(raw({"url": "https://a/b.mp3"})) == MEDIA_TOKENS


def test_video_counts_its_bytes() -> None:
    """There is a least number, and the one of the longest video that an engine takes."""
    assert video_tokens(raw({"url": f"data:video/mp4;base64,{text_of(bytes(3_000_000))}"})) == 2929
    assert video_tokens(raw(text_of(b"\0\0\0"))) == MEDIA_TOKENS
    assert video_tokens(raw("https://a/b.mp4")) == MEDIA_TOKENS
