"""The forms in which ``dp-extproc envoy-config`` prints, by their names."""

from collections.abc import Callable, Mapping
from typing import Final

from dp_extproc.config import Config
from dp_extproc.envoy_config.formats import bootstrap

Files = Mapping[str, str]
"""Texts of YAML by file name."""

FORMS: Final[Mapping[str, Callable[[Config], Files]]] = {"bootstrap": bootstrap.files}
"""What makes the files of a form from a configuration."""
