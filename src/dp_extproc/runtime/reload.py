"""Reloads the configuration while the service runs, if it came from a file."""

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from prometheus_client.core import CounterMetricFamily, Metric

from dp_extproc.config import Config, ConfigError, ConfigSource, Problem, Reload, Warn, parse_config
from dp_extproc.runtime.secrets import external_problems
from dp_extproc.settled import read_settled

_WATCH_SECONDS: Final = 1.0
"""Seconds between two readings of the file, with ``reload: watch``."""
_CHANGEABLE: Final = frozenset({"pools", "load", "admission", "autoscaling", "drain"})
"""Sections that a reload may change. On each other one sockets, Envoy, other replicas or running requests depend."""
_FIXED_LOADS: Final = ("prefill_step_cost_tokens", "decode_request_cost_tokens")
"""Keys of ``load`` that a reload may not change, since reservations are counted in their units."""
_REMEDY: Final = "cannot change while the service runs; restart it, and print the Envoy configuration anew"

_log = logging.getLogger(__name__)


def needs_restart(before: Config, after: Config) -> tuple[Problem, ...]:
    """Find the settings that differ and need a restart."""
    fixed = [key for key in Config.model_fields if key not in _CHANGEABLE]
    keys = [key for key in fixed if getattr(before, key) != getattr(after, key)]
    keys += [f"load.{key}" for key in _FIXED_LOADS if getattr(before.load, key) != getattr(after.load, key)]
    return tuple(Problem(None, key, _REMEDY) for key in keys)


class Reloader:
    """Applies a changed file. A file that cannot be used is rejected as a whole and logged."""

    def __init__(
        self,
        source: ConfigSource,
        text: str,
        config: Config,
        apply: Callable[[Config, str], None],
        warn: Warn | None = None,
    ) -> None:
        """Begin with *config*, the configuration in *text*, which *source* gave.

        *apply* is called with every configuration that can be used, and its text. *warn* is called for each old name in
        the file; None stands for the log.
        """
        self._source = source
        self._seen: str | None = text
        self._text = text
        self._config = config
        self._apply = apply
        self._warn = warn or partial(_log.warning, "%s: %s", source.name)
        self._reported_fixed = False
        self._requested = asyncio.Event()
        self._counts: Counter[str] = Counter(applied=0, refused=0)

    def request(self) -> None:
        """Request a reload, whether the file has changed or not."""
        self._requested.set()

    async def run(self) -> None:
        """Reload the file on request, and with ``reload: watch`` when it has changed, until cancelled."""
        is_watched = self._config.reload is Reload.WATCH
        if is_watched and not self._source.can_change:
            self._report_fixed()
        interval = _WATCH_SECONDS if is_watched and self._source.can_change else None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._requested.wait()
            requested = self._requested.is_set()
            self._requested.clear()
            if self._source.can_change:
                await self._check(requested=requested)
            else:
                self._counts["refused"] += 1
                self._report_fixed()

    def _report_fixed(self) -> None:
        """Log once that there is no file to read."""
        if not self._reported_fixed:
            self._reported_fixed = True
            _log.warning(
                "configuration: it came from the %s, which cannot be read again, so nothing is reloaded; restart the "
                "service to change it, or use a file",
                self._source.name,
            )

    async def _check(self, *, requested: bool) -> None:
        try:
            if requested:
                text = await asyncio.to_thread(self._source.read)
            elif (settled := await read_settled(self._source.read, self._seen)) is None:
                return  # the next reading finds it changed, too
            else:
                text = settled
        except ConfigError as error:
            if requested or self._seen is not None:
                self._reject(error)
            self._seen = None
            return
        if not requested and text == self._seen:
            return
        self._seen = text
        try:
            config = await asyncio.to_thread(self._read, text)
        except ConfigError as error:
            self._reject(error)
            return
        try:
            self._apply(config, text)
        except Exception:  # noqa: BLE001 - after any error the previous configuration stays in use
            self._counts["refused"] += 1
            _log.exception("configuration: cannot be used, the one before stays in use")
            self._restore()
            return
        self._config, self._text = config, text
        self._counts["applied"] += 1
        _log.info("configuration: %s is in use as it is now", self._source.name)

    def _restore(self) -> None:
        """Apply the previous configuration again, since a part of it may be replaced already."""
        try:
            self._apply(self._config, self._text)
        except Exception:  # noqa: BLE001 - the process continues with the parts that were restored
            _log.exception("configuration: a part of the one before is not in use; restart the service")

    def _read(self, text: str) -> Config:
        config = parse_config(text, self._source.name, self._warn, os.environ)
        if problems := (*needs_restart(self._config, config), *external_problems(config)):
            raise ConfigError(self._source.name, problems)
        return config

    def _reject(self, error: ConfigError) -> None:
        self._counts["refused"] += 1
        _log.error("configuration: refused, the one before stays in use: %s", error)

    def collect(self) -> Iterator[Metric]:
        reloads = CounterMetricFamily(
            "dp_extproc_config_reloads", "Times that the configuration was reloaded.", labels=["outcome"]
        )
        for outcome, count in self._counts.items():
            reloads.add_metric([outcome], count)
        yield reloads
