"""Put the schema of the configuration into the chart's values.schema.json, so that Helm refuses a wrong configuration.

    python deploy/helm/config_schema.py [FILE]

Run it after a change of the configuration, by ``make manifests``. The rest of the file is written by hand.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from dp_extproc.config.json_schema import json_schema

LOOK_AHEAD = re.compile(r"\(\?[=!][^)]*\)")
SECRET = {
    "type": "object",
    "description": "A key of a Secret, which the chart mounts.",
    "properties": {"secret": {"type": "string", "minLength": 1}, "key": {"type": "string", "minLength": 1}},
    "required": ["secret"],
    "additionalProperties": False,
}


def chart_schema(schema: Any) -> Any:
    """Return a schema without titles, and without look-aheads in patterns, which Go does not compile."""
    if isinstance(schema, list):
        return [chart_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: chart_schema(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))
    }
    if isinstance(found.get("pattern"), str):
        found["pattern"] = LOOK_AHEAD.sub("", found["pattern"])
    return found


def main(path: Path) -> None:
    """Replace the value ``config`` and the definitions in the file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    schema = chart_schema(json_schema())
    definitions = schema.pop("$defs")
    pool = definitions["PoolConfig"]
    del pool["oneOf"]  # the chart adds the workers of an InferencePool
    for role in ("prefill", "decode", "workers"):
        pool["properties"][role]["anyOf"].insert(0, {"$ref": "#/$defs/KubernetesSettings"})
    pool["properties"]["api_key"]["anyOf"].insert(0, SECRET)
    del schema["properties"]["pools"]["minItems"]  # values.yaml has no pools
    kept = {name: schema["properties"][name] | described for name, described in described_by_hand(values).items()}
    config = {"type": "object", "additionalProperties": False, "properties": schema["properties"] | kept}
    values["properties"]["config"] = {"description": values["properties"]["config"]["description"], **config}
    values["$defs"] = definitions
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def described_by_hand(values: Any) -> dict[str, Any]:
    """Return what values.yaml has of the configuration, with the descriptions for users of the chart."""
    properties = values["properties"]["config"]["properties"]
    return {name: {"description": properties[name]["description"]} for name in ("reload", "pools")}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "dp-extproc/values.schema.json")
