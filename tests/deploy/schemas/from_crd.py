"""Print the JSON schema of the kind that a CustomResourceDefinition defines, without descriptions.

    python tests/deploy/schemas/from_crd.py CRD.yaml [OPEN...] > KIND.json

Where the definition names the keys of an object, no other key is allowed: the API server would drop it without an
error. The properties named OPEN take any object, such as templates of pods, which a test checks by Kubernetes' schemas.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def strict(schema: Any, left_open: Sequence[str]) -> Any:
    """Return a schema that allows named keys only, and has neither descriptions nor Kubernetes' extensions."""
    if isinstance(schema, list):
        return [strict(each, left_open) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: {name: {} if name in left_open else strict(each, left_open) for name, each in value.items()}
        if key == "properties"
        else strict(value, left_open)
        for key, value in schema.items()
        if key != "description" and not key.startswith("x-")
    }
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    return kept


def main(path: Path, left_open: Sequence[str]) -> None:
    """Print the schema of the version that is stored."""
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]
    (version,) = [each for each in spec["versions"] if each["storage"]]
    schema = strict(version["schema"]["openAPIV3Schema"], left_open)
    schema["properties"].pop("status", None)
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    schema["properties"]["apiVersion"] = {"const": f"{spec['group']}/{version['name']}"}
    schema["properties"]["kind"] = {"const": spec["names"]["kind"]}
    sys.stdout.write(json.dumps(schema, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
