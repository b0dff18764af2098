"""Environment variables in a text: ``${NAME}`` and ``${NAME:-default}``; ``$${`` stands for a literal ``${``.

This module loads nothing, because the health check of the image uses it, too.
"""

import re
from collections.abc import Mapping
from typing import Final

_REFERENCE: Final = re.compile(
    r"(?P<literal>\$\$\{)|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\}|(?P<wrong>\$\{)"
)


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Replace every reference in *text*. A default also stands for an empty variable, as in a shell.

    Raises:
        ValueError: A reference is malformed, or its variable is not set and has no default.
    """

    def value(found: re.Match[str]) -> str:
        if found["literal"]:
            return "${"
        if found["wrong"]:
            raise ValueError("write ${NAME} or ${NAME:-default}, or $${ for a literal ${")
        name, default = found["name"], found["default"]
        if default is not None:
            return environment.get(name) or default
        if name not in environment:
            raise ValueError(f"the variable {name} is not set; set it, or write ${{{name}:-default}}")
        return environment[name]

    return _REFERENCE.sub(value, text)


def escape(text: str) -> str:
    """Return a text that :func:`expand` turns into *text*."""
    return text.replace("${", "$${")
