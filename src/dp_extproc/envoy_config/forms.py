"""The forms in which ``dp-extproc envoy-config`` prints, by their names."""

from collections.abc import Callable, Collection, Mapping
from typing import Final

from msgspec import Struct

from dp_extproc.config import Config
from dp_extproc.envoy_config.formats import bootstrap, envoy_gateway, istio, parts, xds
from dp_extproc.envoy_config.formats.target import Target

Files = Mapping[str, str]
"""Texts of YAML by file name."""


class Form(Struct, frozen=True):
    """A form of Envoy's side of a configuration."""

    files: Callable[[Config, Target], Files]
    """Makes the files."""
    takes: Collection[str] = ()
    """Options of the command line about the gateway that it uses; see :mod:`.target`."""
    needs: Collection[str] = ()
    """Those of them without which it cannot be printed."""
    keep: Callable[[Files, Files], Files] | None = None
    """Adds what must stay of the old files to new ones, for streams in flight."""


FORMS: Final[Mapping[str, Form]] = {
    "bootstrap": Form(bootstrap.files),
    "parts": Form(parts.files),
    "xds": Form(xds.files, keep=xds.keep),
    "envoy-gateway": Form(envoy_gateway.files, envoy_gateway.TAKES, envoy_gateway.NEEDS),
    "istio": Form(istio.files, istio.TAKES, istio.NEEDS),
}
