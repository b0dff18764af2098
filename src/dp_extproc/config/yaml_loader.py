"""YAML whose every mistake is a :class:`yaml.YAMLError` with its line."""

from typing import Any

import yaml


class _Reporting(yaml.constructor.SafeConstructor):
    """Reports values that do not fit their tag, such as an impossible date. PyYAML has no error of its own for them."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - as in the base class
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError) as error:  # the latter for !!bool x, !!int '', !!timestamp x
            problem = str(error) if isinstance(error, ValueError) else f"a value does not fit its tag ({error})"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class SafeLoader(_Reporting, yaml.SafeLoader):
    """The loader that also makes nodes with their lines."""


_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class FastLoader(_Reporting, _PARSER):  # type: ignore[misc]  # mypy follows no class in a variable
    """The loader for large files. In C it takes a tenth of the time, where PyYAML has it."""


def place_and_problem(error: yaml.YAMLError) -> tuple[int | None, str]:
    """Return the line of a mistake, counted from 1, and what it is."""
    mark = getattr(error, "problem_mark", None)
    return (mark.line + 1 if mark else None), f"is not valid YAML: {getattr(error, 'problem', None) or error}"
