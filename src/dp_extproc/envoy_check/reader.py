"""Reads an Envoy from its admin address, or from files, within bounds of time and size."""

import asyncio
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import msgspec
import yaml

from dp_extproc.config.yaml_loader import FastLoader, place_and_problem
from dp_extproc.envoy_check.messages import UnreadableError
from dp_extproc.envoy_check.snapshot import Snapshot, read_snapshot, snake

_SECONDS: Final = 30.0
"""Longest time for one page. A gateway with thousands of routes takes some seconds."""
_MOST_BYTES: Final = 512 << 20
"""Most bytes of a page or a file. The dump of a large mesh has some 100 MB."""
_SHOWN: Final = 40
"""Characters that are shown of a page that cannot be read."""
_VERSION: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_ADMIN: Final = "is this Envoy's admin address?"


async def read_envoy(sources: Sequence[str]) -> Snapshot:
    """Read what admin addresses and files have together.

    Raises:
        UnreadableError: One of them cannot be read, or has nothing of an Envoy. The text begins with its name.
    """
    documents: list[Any] = []
    details: dict[str, Any] = {}
    for source in sources:
        try:
            if source.startswith(("http://", "https://")):
                dump, details = await _read_admin(source)
                read = [dump]
            else:
                read = _read_file(Path(source))
            read_snapshot(read)  # so that a refusal names this source
        except UnreadableError as error:
            raise UnreadableError(f"{source}: {error}") from None
        documents += read
    return msgspec.structs.replace(read_snapshot(documents), **details)


async def _read_admin(url: str) -> tuple[Any, dict[str, Any]]:
    """Read the dump of an Envoy, and what its page ``/server_info`` adds."""
    try:
        base = f"{urlsplit(url).scheme}://{urlsplit(url).netloc}"
        async with httpx.AsyncClient(timeout=None, trust_env=False, verify=_any_certificate()) as client:  # noqa: S113
            dump = _parse_json(await _get(client, f"{base}/config_dump?include_eds"))
            try:
                return dump, dict(_server_info(_parse_json(await _get(client, f"{base}/server_info"))))
            except UnreadableError:
                return dump, {}
    except (httpx.InvalidURL, ValueError) as error:
        raise UnreadableError(f"is no URL: {error}") from None


def _any_certificate() -> ssl.SSLContext:
    """Make a context that trusts any certificate: what is read there is shown and not obeyed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _get(client: httpx.AsyncClient, url: str) -> bytes:
    page = bytearray()
    try:
        async with asyncio.timeout(_SECONDS), client.stream("GET", url) as response:
            if response.status_code != httpx.codes.OK:
                raise UnreadableError(f"{url} answered {response.status_code}; {_ADMIN}")
            async for chunk in response.aiter_raw():
                page += chunk
                if len(page) > _MOST_BYTES:
                    raise UnreadableError(f"{url} is larger than {_MOST_BYTES >> 20} MiB")
    except TimeoutError:
        raise UnreadableError(f"{url} was not answered within {_SECONDS:g} s") from None
    except httpx.ConnectError as error:
        raise UnreadableError(f"no connection ({error}); {_ADMIN} Can it be reached from here?") from None
    except httpx.HTTPError as error:
        raise UnreadableError(f"{url} got no complete HTTP answer: {error or type(error).__name__}") from None
    return bytes(page)


def _server_info(page: Any) -> Iterator[tuple[str, Any]]:
    info = snake(page)
    if isinstance(info.get("state"), str):
        yield "state", info["state"]
    if found := _VERSION.search(str(info.get("version")).partition("/")[2]):
        yield "version", tuple(map(int, found.groups()))
    options = info.get("command_line_options")
    drain = snake(options).get("drain_time") if isinstance(options, Mapping) else None
    if isinstance(drain, str) and drain.removesuffix("s").replace(".", "", 1).isdecimal():
        yield "drain_seconds", float(drain.removesuffix("s"))


def _read_file(path: Path) -> list[Any]:
    try:
        if path.is_dir():
            files = sorted(each for each in path.iterdir() if each.suffix in {".yaml", ".yml", ".json"})
            return [document for each in files for document in _read_file(each)]
        if path.stat().st_size > _MOST_BYTES:
            raise UnreadableError(f"is larger than {_MOST_BYTES >> 20} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from None
    if content.lstrip()[:1] == b"{":
        return [_parse_json(content)]
    try:
        documents = list(yaml.load_all(content.decode(), FastLoader))
    except UnicodeDecodeError:
        raise UnreadableError("is no text in UTF-8") from None
    except yaml.YAMLError as error:
        line, problem = place_and_problem(error)
        raise UnreadableError(f"line {line}: {problem}" if line else problem) from None
    except RecursionError:
        raise UnreadableError("is nested too deeply") from None
    if not (found := [each for each in documents if each is not None]):
        raise UnreadableError("is empty")
    return found


def _parse_json(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError) as error:
        begin = content[:_SHOWN].decode(errors="replace")
        hint = f"; {_ADMIN}" if content.lstrip()[:1] == b"<" else ""
        raise UnreadableError(f"is no complete JSON ({error}); it begins with {begin!r}{hint}") from None
