"""Reading the configuration file anew while the service runs."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from prometheus_client.core import CounterMetricFamily, Metric

from dp_extproc.config import Config, ConfigError, Problem, Reload, Warn, parse_config, read_config
from dp_extproc.runtime.secrets import problems_outside

_LOOK_SECONDS: Final = 1.0
_CHANGEABLE: Final = frozenset({"pools", "load", "admission", "drain"})
"""On all else depend sockets, Envoy's own configuration, the other replicas, or requests under way."""
_FIXED_LOADS: Final = ("prefill_step_cost_tokens", "decode_request_cost_tokens")
"""Units of what stands on the books."""
_REMEDY: Final = "cannot change while the service runs; restart it, and print the Envoy configuration anew"

_log = logging.getLogger(__name__)


def cannot_change(before: Config, after: Config) -> tuple[Problem, ...]:
    """Tell what differs between two configurations that only a restart can change."""
    fixed = [key for key in Config.model_fields if key not in _CHANGEABLE]
    keys = [key for key in fixed if getattr(before, key) != getattr(after, key)]
    keys += [f"load.{key}" for key in _FIXED_LOADS if getattr(before.load, key) != getattr(after.load, key)]
    return tuple(Problem(None, key, _REMEDY) for key in keys)


class Reloader:
    """Hands on what the file says once it says something else; what cannot be used is refused as a whole, and told."""

    def __init__(self, path: Path, text: str, config: Config, apply: Callable[[Config, str], None]) -> None:
        """Begin with what the file said at the start.

        Args:
            path: The file.
            text: Its content.
            config: What that says.
            apply: Told of every configuration that can be used, with its text.
        """
        self._path = path
        self._seen: str | None = text
        self._text = text
        self._config = config
        self._apply = apply
        self.warn: Warn = partial(_log.warning, "%s: %s", path)
        """Called for each old name in the file."""
        self._asked = asyncio.Event()
        self._counts: Counter[str] = Counter(applied=0, refused=0)

    def ask(self) -> None:
        """Have the file read anew, whether it has changed or not."""
        self._asked.set()

    async def run(self) -> None:
        """Read the file when asked, and if it says so when it has changed, until cancelled."""
        patience = _LOOK_SECONDS if self._config.reload is Reload.WATCH else None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), patience)
            asked = self._asked.is_set()
            self._asked.clear()
            await self._look(asked=asked)

    async def _look(self, *, asked: bool) -> None:
        try:
            text = await asyncio.to_thread(read_config, self._path)
        except ConfigError as error:
            if asked or self._seen is not None:
                self._refuse(error)
            self._seen = None
            return
        if not asked and text == self._seen:
            return
        self._seen = text
        try:
            config = await asyncio.to_thread(self._read, text)
        except ConfigError as error:
            self._refuse(error)
            return
        try:
            self._apply(config, text)
        except Exception:  # noqa: BLE001 - whatever it is, requests go on by the configuration before
            self._counts["refused"] += 1
            _log.exception("configuration: cannot be used, the one before stays in use")
            self._return()
            return
        self._config, self._text = config, text
        self._counts["applied"] += 1
        _log.info("configuration: %s is in use as it is now", self._path)

    def _return(self) -> None:
        """Go back to the configuration before, of which a part may be exchanged already."""
        try:
            self._apply(self._config, self._text)
        except Exception:  # noqa: BLE001 - the process goes on, whatever is left of it
            _log.exception("configuration: a part of the one before is not in use; restart the service")

    def _read(self, text: str) -> Config:
        config = parse_config(text, str(self._path), self.warn)
        if problems := (*cannot_change(self._config, config), *problems_outside(config)):
            raise ConfigError(str(self._path), problems)
        return config

    def _refuse(self, error: ConfigError) -> None:
        self._counts["refused"] += 1
        _log.error("configuration: refused, the one before stays in use: %s", error)

    def collect(self) -> Iterator[Metric]:
        """Collect for /metrics."""
        reloads = CounterMetricFamily(
            "dp_extproc_config_reloads", "Times that the configuration was read anew.", labels=["outcome"]
        )
        for outcome, count in self._counts.items():
            reloads.add_metric([outcome], count)
        yield reloads
