"""Secrets that the configuration only refers to: certificates in files, API keys in files or environment variables."""

import logging
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from dp_extproc.config import ApiKeySource, Config, Problem, ServerTls
from dp_extproc.fleet.discovery.sources import missing_libraries
from dp_extproc.runtime.engine_tls import problems_of_engine_tls
from dp_extproc.runtime.self_signed import KeyAndCertificate, make_certificate, missing_library
from dp_extproc.runtime.sockets import StartError
from dp_extproc.runtime.tls_files import file_signature, unreadable

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, repr=False)
class ApiKeys:
    """API keys by pool, and the problems of keys that could not be read. ``repr`` hides the keys."""

    by_pool: Mapping[str, str]
    problems: tuple[Problem, ...]


def read_api_keys(config: Config, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Read the API key of every pool that has one. The text of a problem has no key."""
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
        ValueError: There is none, or no header can carry it. The message names the source, never the key.
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
    """Find the problems of the files of ``listen.tls``."""
    if tls is None:
        return
    if tls.self_signed and (message := missing_library()) is not None:
        yield Problem(None, "listen.tls.self_signed", message)
    if problems := tuple(unreadable("listen.tls", tls.files)):
        yield from problems
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if tls.cert is not None:
        try:
            context.load_cert_chain(tls.cert, tls.key, password="")
        except (OSError, ValueError) as error:
            yield Problem(None, "listen.tls", f"{tls.cert} and {tls.key} are not a certificate and its key: {error}")
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except OSError as error:
            yield Problem(None, "listen.tls.client_ca", f"{tls.client_ca} holds no certificate: {error}")


def external_problems(config: Config) -> tuple[Problem, ...]:
    """Find problems of the files, environment variables and libraries that a correct configuration needs."""
    return (
        *problems_of_tls(config.listen.tls),
        *problems_of_engine_tls(config.engine_tls),
        *read_api_keys(config).problems,
        *missing_libraries(config),
    )


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is not UTF-8"


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Make credentials that follow the files: gRPC fetches them at every handshake.

    Files that do not fit together, as during a replacement, are not used until they do. A self-signed certificate stays
    the same for the life of the process.

    Raises:
        StartError: A file cannot be read any more.
    """
    pair = make_certificate() if tls.self_signed else None
    try:
        first, certificates = file_signature(tls.files.values()), _certificates(tls, pair)
    except OSError as error:
        raise StartError(f"listen.tls: {error.filename} cannot be read: {_reason(error)}") from None
    return grpc.dynamic_ssl_server_credentials(
        certificates,
        _RenewedCertificates(tls, pair, first),
        require_client_authentication=tls.client_ca is not None,
    )


class _RenewedCertificates:
    """Called by gRPC at each handshake. Returns the certificates if the files have changed, else None."""

    def __init__(self, tls: ServerTls, pair: KeyAndCertificate | None, seen: object) -> None:
        self._tls = tls
        self._pair = pair
        self._seen = seen

    def __call__(self) -> Any:
        try:
            now = file_signature(self._tls.files.values())
            if now == self._seen:
                return None
            self._seen = now
            if problems := list(problems_of_tls(self._tls)):
                _log.error("TLS: the files have changed, but stay unused: %s", "; ".join(map(str, problems)))
                return None
            renewed = _certificates(self._tls, self._pair)
        except OSError as error:
            _log.error("TLS: the files have changed, but cannot be read: %s", error)
            return None
        _log.info("TLS: new connections get what %s have now", ", ".join(self._tls.files.values()))
        return renewed


def _certificates(tls: ServerTls, pair: KeyAndCertificate | None) -> Any:
    files = {key: Path(path).read_bytes() for key, path in tls.files.items()}
    used = pair or (files["key"], files["cert"])
    return grpc.ssl_server_certificate_configuration([used], root_certificates=files.get("client_ca"))
