"""A configuration without a file: engines by their URLs, as options or environment variables give them.

They become the text of a configuration, so the same checks apply. Problems have the name of the option or variable.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from dp_extproc.config.problems import ConfigError, Problem
from dp_extproc.config.source import FixedText
from dp_extproc.variables import escape

ROLES: Final = ("prefill", "decode", "workers")
_SETTINGS: Final = {
    "listen": ("listen", "grpc"),
    "admin": ("listen", "admin"),
    "processes": ("listen", "workers"),
    "envoy_listen": ("envoy", "inference"),
}
"""Section and key of each option that is not about a pool."""
_DNS: Final = re.compile(r"dns://(?P<name>[^/:@\s]+)(?::(?P<port>[0-9]{1,5}))?/?")


@dataclass(frozen=True, slots=True)
class Given:
    """The values of one option or environment variable."""

    place: str
    """Its name, such as ``--prefill`` or ``DP_EXTPROC_PREFILL``."""
    values: tuple[Any, ...]

    @property
    def is_option(self) -> bool:
        return self.place.startswith("-")


@dataclass(frozen=True, slots=True)
class WithoutFile:
    """A configuration that is made of options and variables."""

    source: FixedText
    _places: Mapping[str, str]
    """What gave the value of a key, by the path of the key."""

    def renamed(self, problems: Iterable[Problem]) -> Iterator[Problem]:
        """Replace paths of keys by options and variables, in the place and in the message of each problem."""
        longest_first = sorted(self._places.items(), key=lambda item: -len(item[0]))
        for problem in problems:
            message = problem.message
            for key, place in longest_first:
                message = message.replace(key, place)
            places = (place for key, place in longest_first if problem.key.startswith(key))
            yield Problem(None, next(places, ""), message)


def configure(given: Mapping[str, Given]) -> WithoutFile:
    """Make the configuration of what was given, by the names of the options.

    Raises:
        ConfigError: The URLs of a role are missing, or are too many.
    """
    name = "command line" if any(each.is_option for each in given.values()) else "environment"
    roles = [role for role in ROLES if role in given]
    if roles not in (["prefill", "decode"], ["workers"]):
        remedy = (
            "give --prefill and --decode, or --workers alone for engines that do both; a file may have several pools"
        )
        raise ConfigError(name, [Problem(None, ", ".join(given[role].place for role in roles), remedy)])
    models = given.get("model", Given("", ("*",)))
    pool: dict[str, Any] = {"models": list(models.values)}
    content: dict[str, Any] = {"pools": [pool]}
    places = {"pools[0]": models.place} | {
        f"pools[0].models[{index}]": f"{models.place} {model}" for index, model in enumerate(models.values)
    }
    for role in roles:
        sources: dict[str, list[Any]] = {}
        for url in given[role].values:
            key, value = _source_of(url)
            of_key = sources.setdefault(key, [])
            places[f"pools[0].{role}.{key}[{len(of_key)}]"] = f"{given[role].place} {url.rpartition('@')[2]}"
            of_key.append(value)
        pool[role] = sources
    for option, (section, key) in _SETTINGS.items():
        if option in given:
            (value,) = given[option].values
            content.setdefault(section, {})[key] = value
            places[f"{section}.{key}"] = given[option].place
            if option == "processes":
                places[section] = given[option].place
    text = escape(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=float("inf")))
    return WithoutFile(FixedText(name, text), places)


def _source_of(url: str) -> tuple[str, Any]:
    """Return the key of a role for a URL, and its value: an endpoint, or a DNS name with an address for each."""
    found = _DNS.fullmatch(url)
    if found is None:
        return "endpoints", url
    settings: dict[str, Any] = {"name": found["name"]}
    if found["name"].startswith("_"):
        settings["type"] = "srv"
    if found["port"] is not None:
        settings["port"] = int(found["port"])
    return "dns", settings
