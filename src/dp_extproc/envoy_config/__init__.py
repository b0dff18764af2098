"""Envoy's side of a configuration file, as typed objects and as text."""

from dp_extproc.envoy_config.formats.bootstrap import build_bootstrap
from dp_extproc.envoy_config.forms import FORMS
from dp_extproc.envoy_config.tls import secret_files
from dp_extproc.envoy_config.yaml_text import render_yaml

__all__ = ["FORMS", "build_bootstrap", "render_yaml", "secret_files"]
