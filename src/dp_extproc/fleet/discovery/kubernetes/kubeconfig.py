"""Reads the current context of kubeconfig files, as kubectl merges them: the first file with a name counts. Pure."""

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import yaml
from msgspec import Struct, field

from dp_extproc.config.yaml_loader import SafeLoader

T = TypeVar("T", bound=Struct)


class AccessError(Exception):
    """The way to the API server is unknown. The message ends with a remedy."""


class ClusterEntry(Struct, rename="kebab"):
    """Where an API server is, and how its certificate is verified."""

    server: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""


class UserEntry(Struct, rename="kebab"):
    """The credentials of a user."""

    token: str = ""
    token_file: str = field(name="tokenFile", default="")
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    username: str = ""
    exec: dict[str, Any] | None = None
    auth_provider: dict[str, Any] | None = None


class ContextEntry(Struct):
    """A cluster, a user and a namespace."""

    cluster: str = ""
    user: str = ""
    namespace: str = ""


class _Named(Struct):
    name: str
    cluster: ClusterEntry | None = None
    user: UserEntry | None = None
    context: ContextEntry | None = None


class _Kubeconfig(Struct, rename="kebab"):
    current_context: str | None = None
    clusters: list[_Named] | None = None
    users: list[_Named] | None = None
    contexts: list[_Named] | None = None


_NO_PROGRAMS: Final = (
    "which this service does not run; issue a token with `kubectl create token NAME` and write it as token, or run "
    "`kubectl proxy` and write its address as server"
)


def current_context(files: Iterable[tuple[Path, str]]) -> tuple[ContextEntry, ClusterEntry, UserEntry]:
    """Return the current context with its cluster and user. Their paths no longer depend on where their file is.

    Args:
        files: Path and text of each file.

    Raises:
        AccessError: There is none, or it cannot be used.
    """
    read = [_parse(path, text) for path, text in files]
    paths = ", ".join(str(path) for path, _ in read)
    name = next((each.current_context for _, each in read if each.current_context), "")
    if not name:
        raise AccessError(f"{paths}: no context is selected; run kubectl config use-context NAME")
    context = next((each.context for _, one in read for each in one.contexts or () if each.name == name), None)
    if context is None:
        raise AccessError(f"{paths}: there is no context {name}; run kubectl config use-context NAME")
    cluster = next(
        (each.cluster for _, one in read for each in one.clusters or () if each.name == context.cluster), None
    )
    if cluster is None or not cluster.server.startswith(("https://", "http://")):
        raise AccessError(f"{paths}: context {name} has no cluster with an address; correct its cluster and server")
    user = next((each.user for _, one in read for each in one.users or () if each.name == context.user), None)
    if context.user and user is None:
        raise AccessError(f"{paths}: there is no user {context.user}; correct the context {name}")
    user = user or UserEntry()
    unsupported = {"exec": user.exec, "auth-provider": user.auth_provider, "username": user.username}
    for key, value in unsupported.items():
        if value:
            raise AccessError(f"{paths}: user {context.user} signs in by {key}, {_NO_PROGRAMS}")
    return context, cluster, user


def decoded(data: str, key: str) -> bytes:
    """Decode a certificate or a key.

    Raises:
        AccessError: It is no base64.
    """
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise AccessError(f"kubeconfig: {key} is no base64; write the path into {key.removesuffix('-data')}") from None


def _parse(path: Path, text: str) -> tuple[Path, _Kubeconfig]:
    try:
        content = yaml.load(text, Loader=SafeLoader)  # noqa: S506 - it is a safe loader
        found = msgspec.convert({} if content is None else content, _Kubeconfig)
    except (yaml.YAMLError, msgspec.MsgspecError, RecursionError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise AccessError(f"{path} is no kubeconfig ({first}); check it with kubectl config view") from None
    for each in found.clusters or ():
        if each.cluster is not None:
            _resolve(each.cluster, path.parent, "certificate_authority")
    for each in found.users or ():
        if each.user is not None:
            _resolve(each.user, path.parent, "token_file", "client_certificate", "client_key")
    return path, found


def _resolve(entry: Struct, folder: Path, *fields: str) -> None:
    """Make paths absolute that are relative to their file."""
    for name in fields:
        if value := getattr(entry, name):
            setattr(entry, name, str(folder / value))
