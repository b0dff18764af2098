"""The forms in which ``dp-extproc envoy-config`` prints, by their names."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final

from msgspec import Struct, field

from dp_extproc.config import Config, EnvoySettings
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
    without_effect: Mapping[str, str] = field(default_factory=dict)
    """Keys of section ``envoy`` that the form has no place for, each with what to do instead."""
    is_followed: bool = False
    """Whether Envoy reads the files again when they are replaced."""

    def notes(self, name: str, settings: EnvoySettings) -> Iterator[str]:
        """Yield a line for each setting that differs from the default, and has no effect in this form."""
        for key, remedy in self.without_effect.items():
            if getattr(settings, key) != EnvoySettings.model_fields[key].default:
                yield f"envoy.{key} has no effect with --format {name}: {remedy}"


FORMS: Final[Mapping[str, Form]] = {
    "bootstrap": Form(bootstrap.files),
    "parts": Form(parts.files, without_effect=parts.WITHOUT_EFFECT),
    "xds": Form(xds.files, is_followed=True),
    "envoy-gateway": Form(envoy_gateway.files, envoy_gateway.TAKES, envoy_gateway.NEEDS, envoy_gateway.WITHOUT_EFFECT),
    "istio": Form(istio.files, istio.TAKES, istio.NEEDS, istio.WITHOUT_EFFECT),
}
