"""What the configuration file only refers to: files of certificates, keys in files or in the environment."""

import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dp_extproc.config import ApiKeySource, Config, Problem, ServerTls


@dataclass(frozen=True, slots=True, repr=False)
class ApiKeys:
    """The keys that could be read, and what is wrong with the others. It is printed without them."""

    by_pool: Mapping[str, str]
    problems: tuple[Problem, ...]


def read_api_keys(config: Config, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Read the API key of every pool that has one. No problem repeats a key."""
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for index, pool in enumerate(config.pools):
        if pool.api_key is None:
            continue
        try:
            found[pool.name] = _read_key(pool.api_key, environment)
        except ValueError as error:
            problems.append(Problem(None, f"pools[{index}].api_key", str(error)))
    return ApiKeys(found, tuple(problems))


def _read_key(source: ApiKeySource, environment: Mapping[str, str]) -> str:
    """Read one key.

    Raises:
        ValueError: There is none, or it cannot be sent in a header; the message says where, but not what.
    """
    if source.file is None:
        key = environment.get(source.env or "", "")
    else:
        try:
            key = Path(source.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{source.place} cannot be read: {_reason(error)}") from None
    key = key.strip()
    if not key:
        raise ValueError(f"{source.place} holds no key")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(f"{source.place} holds more than one word of printable ASCII, which no header can carry")
    return key


def problems_of_tls(tls: ServerTls | None) -> Iterator[Problem]:
    """Tell what is wrong with the files of ``listen.tls``."""
    if tls is None:
        return
    unreadable = False
    for key, path in tls.files.items():
        try:
            Path(path).read_bytes()
        except OSError as error:
            unreadable = True
            yield Problem(None, f"listen.tls.{key}", f"{path} cannot be read: {_reason(error)}")
    if unreadable:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.cert, tls.key, password="")
    except (ssl.SSLError, ValueError) as error:
        yield Problem(None, "listen.tls", f"{tls.cert} and {tls.key} are not a certificate and its key: {error}")
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except ssl.SSLError as error:
            yield Problem(None, "listen.tls.client_ca", f"{tls.client_ca} holds no certificate: {error}")


def problems_outside(config: Config) -> tuple[Problem, ...]:
    """Tell everything that would keep the service from starting although the file itself is right."""
    return (*problems_of_tls(config.listen.tls), *read_api_keys(config).problems)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8"
