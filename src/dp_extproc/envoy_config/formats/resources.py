"""Objects of Kubernetes that forms for gateways print."""

from collections.abc import Iterable, Mapping
from typing import Any

from dp_extproc.config import Config
from dp_extproc.envoy_config.formats.target import ObjectName
from dp_extproc.envoy_config.yaml_text import Fields, render_yaml


def name_of_ours(config: Config, gateway: ObjectName) -> ObjectName:
    """Return the name of our objects for a gateway. It has the prefix of the names in Envoy, and their namespace."""
    prefix = config.envoy.name_prefix.lower().replace("_", "-").lstrip("-")
    return ObjectName(gateway.namespace, f"{prefix}dp-extproc")


def resource(version: str, kind: str, name: ObjectName, spec: Mapping[str, Any]) -> Fields:
    """Build an object.

    Args:
        version: Group and version, such as ``gateway.networking.k8s.io/v1``.
        kind: Its kind.
        name: Name and namespace.
        spec: Its section ``spec``, with messages inside.
    """
    metadata = {"name": name.name, "namespace": name.namespace}
    return Fields(apiVersion=version, kind=kind, metadata=metadata, spec=spec)


def documents(header: str, resources: Iterable[Fields]) -> str:
    """Write objects as one text of YAML, with a comment above."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    return f"{comment}\n" + "---\n".join(map(render_yaml, resources))
