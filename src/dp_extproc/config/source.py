"""Where the text of a configuration comes from: a file, which may change, or a text that stays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dp_extproc.config.problems import ConfigError, Problem


class ConfigSource(Protocol):
    """A text that can be read, and its name in messages."""

    @property
    def name(self) -> str: ...

    @property
    def can_change(self) -> bool:
        """Whether another reading may give another text."""
        ...

    def read(self) -> str:
        """Read the text, or raise :class:`ConfigError` with the reason that it cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A configuration file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def can_change(self) -> bool:
        return True

    def read(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(self.name, [Problem(None, "", f"cannot be read: {error}")]) from None


@dataclass(frozen=True, slots=True)
class FixedText:
    """A text that was given at the start, by standard input or by options."""

    name: str
    text: str

    @property
    def can_change(self) -> bool:
        return False

    def read(self) -> str:
        return self.text
