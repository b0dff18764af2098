"""Replacement of the files that a running Envoy reads again, in an order that loses no request."""

import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

import httpx

from dp_extproc.config import SocketAddress
from dp_extproc.envoy_config.formats import xds

_PATIENCE: Final = 30.0
"""Seconds for Envoy to resolve the names and check the health of new clusters. A lost DNS query takes some 20 s."""
_PAGES: Final = {
    xds.CLUSTERS: "/clusters",
    xds.LISTENERS: "/listeners",
    xds.ROUTES: "/config_dump?resource=dynamic_route_configs",
}
"""Envoy's admin page that shows the resources of each file which are in use."""
_CLUSTER_OF_ROUTE: Final = re.compile(r'"cluster": "([^"]+)"')
_PAUSE: Final = 0.1
"""Seconds between two looks at Envoy's admin pages."""


def write(directory: Path, files: Mapping[str, str]) -> None:
    """Write files in their order, each by rename, because Envoy may read them again at once.

    Raises:
        OSError: A file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        new = directory / f".{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(directory / name)


def replace_block(
    directory: Path,
    files: Mapping[str, str],
    admin: SocketAddress,
    note: Callable[[str], object],
    *,
    keep: bool,
    patience: float = _PATIENCE,
) -> None:
    """Write files step by step: each when Envoy uses the one before, and the old block leaves last.

    Envoy refuses listeners whose clusters it does not have yet, and never reads that file again by itself. It uses new
    clusters only after the first look at names and health.

    Args:
        directory: Where to write.
        files: Files of the form :mod:`~dp_extproc.envoy_config.formats.xds`.
        admin: Address of Envoy's admin pages.
        note: Called with a line for the operator.
        keep: Whether the old block stays, for requests that last.
        patience: Seconds to wait for Envoy at each step.

    Raises:
        OSError: A file cannot be written, or an old one not be read.
        TimeoutError: Envoy does not use a file; those after it are the old ones.
        ValueError: An old file is not of this form.
    """
    paths = {name: directory / name for name in files}
    old = {name: path.read_text("utf-8") for name, path in paths.items() if path.exists()}
    both = xds.keep(old, files)
    steps = (xds.CLUSTERS, xds.LISTENERS, xds.ROUTES)
    write(directory, {name: text for name, text in files.items() if name not in steps})
    with httpx.Client(base_url=f"http://{admin}", trust_env=False, timeout=patience) as client:
        is_watched = bool(old)
        for file in steps:
            write(directory, {file: both[file]})
            try:
                if is_watched:
                    _wait(client, file, files[file], patience)
            except httpx.HTTPError as error:
                is_watched = False
                note(
                    f"no Envoy responds at {admin} (envoy.admin): {error}; if one runs elsewhere, give it"
                    f" {', '.join(steps)} one by one, each when its admin pages show the names of the one before"
                )
    if not keep:
        write(directory, {file: files[file] for file in steps})


def _wait(client: httpx.Client, file: str, text: str, patience: float) -> None:
    """Wait until Envoy uses a file.

    Raises:
        TimeoutError: It does not.
        httpx.HTTPError: Its admin pages cannot be read.
    """
    until = time.monotonic() + patience
    while missing := [name for name in xds.used_names(file, text) if name not in _shown(client, file)]:
        if time.monotonic() > until:
            raise TimeoutError(
                f"after {patience:g} s Envoy does not use {', '.join(missing)} of {file}, so the files after it are as"
                " before; see update_rejected and Envoy's log, and repeat the command"
            )
        time.sleep(_PAUSE)


def _shown(client: httpx.Client, file: str) -> Collection[str]:
    page = client.get(_PAGES[file]).raise_for_status().text
    return (
        _CLUSTER_OF_ROUTE.findall(page)
        if file == xds.ROUTES
        else [line.partition("::")[0] for line in page.split("\n")]
    )
