"""The JSON Schema of the configuration file, for editors.

It accepts what the loader accepts, but for rules that JSON Schema cannot express, such as names that must differ.
"""

from typing import Final

from pydantic.json_schema import GenerateJsonSchema

from dp_extproc import __version__
from dp_extproc.config.keys import defaults_of, describe, plain, section_at, sections
from dp_extproc.config.renamed import KEYS, VALUES
from dp_extproc.config.schema import Config
from dp_extproc.config.section import JsonSchema

_VARIABLES: Final = "Variables"
_ABOUT: Final = ("title", "description", "default", "examples", "deprecated")
"""Keywords that describe a value, and do not restrict it."""


def json_schema() -> JsonSchema:
    """Make the schema (draft 2020-12)."""
    schema = Config.model_json_schema()
    definitions: JsonSchema = {**schema.pop("$defs"), Config.__name__: schema}
    for section in sections():
        properties = _properties(definitions[section.__name__])
        defaults = defaults_of(section)
        for key, field in section.model_fields.items():
            properties[key] |= {"description": describe(field)}
            properties[key].pop("default", None)
            if key in defaults and not isinstance(defaults[key], dict):
                properties[key]["default"] = defaults[key]
    definitions = {name: _with_variables(each) for name, each in definitions.items()}
    _add_old_names(definitions)
    for each in definitions.values():
        each["description"] = plain(each["description"])
    definitions[_VARIABLES] = {
        "type": "string",
        "pattern": r"\$\{",
        "description": "A value with environment variables: `${NAME}` or `${NAME:-default}`.",
    }
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": f"urn:dp-extproc:configuration:{__version__}",
        **definitions.pop(Config.__name__),
        "title": "Configuration of dp-extproc",
        "$defs": definitions,
    }


def _properties(section: JsonSchema) -> JsonSchema:
    """Return the keys of a section, which may have a shorter form beside the mapping."""
    mapping = section if "properties" in section else section["anyOf"][-1]
    properties: JsonSchema = mapping["properties"]
    return properties


def _add_old_names(definitions: JsonSchema) -> None:
    """Accept the former names of keys and values, marked as deprecated."""
    for path, choices in VALUES.items():
        properties, key = _at(definitions, path)
        about = {each: properties[key].pop(each) for each in _ABOUT if each in properties[key]}
        properties[key] = {**about, "anyOf": [properties[key], {"enum": list(choices), "deprecated": True}]}
    for path, name in KEYS.items():
        properties, key = _at(definitions, path)
        old = {each: value for each, value in properties[name].items() if each not in _ABOUT}
        properties[key] = {**old, "description": f"Old name of `{name}`.", "deprecated": True}


def _at(definitions: JsonSchema, path: str) -> tuple[JsonSchema, str]:
    *parents, key = path.split(".")
    return _properties(definitions[section_at(parents).__name__]), key


def _with_variables(schema: JsonSchema) -> JsonSchema:
    """Accept a text with variables in place of every number, word or text of a certain form."""
    changed = dict(schema)
    for key in schema.keys() & {"properties", "anyOf", "items"}:
        inner = schema[key]
        if key == "properties":
            changed[key] = {name: _with_variables(each) for name, each in inner.items()}
        else:
            changed[key] = [_with_variables(each) for each in inner] if key == "anyOf" else _with_variables(inner)
    kind = schema.get("type")
    if kind in {"integer", "number", "boolean"} or "enum" in schema or (kind == "string" and "pattern" in schema):
        about: JsonSchema = {key: changed.pop(key) for key in _ABOUT if key in changed}
        return {**about, "anyOf": [changed, {"$ref": f"#/$defs/{_VARIABLES}"}]}
    return changed
