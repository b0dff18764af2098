"""Which models there are, and which pool serves each."""

from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

import msgspec

from dp_extproc.config.pools import PoolConfig
from dp_extproc.load.cache import LoadCache
from dp_extproc.request.path import ONE_MODEL
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.decision import Answer

_ANY_MODEL: Final = "*"
SHOWN_MODEL: Final = 200
"""Characters of a model's name in logs and messages; clients may send megabytes."""


class ModelRegistry:
    """The models of all pools."""

    __slots__ = ("_fleet", "_pool_of", "_pools")

    def __init__(self, pools: Iterable[PoolConfig], fleet: LoadCache) -> None:
        """Begin.

        Args:
            pools: As configured; each model in one of them.
            fleet: Knows what the engines of "*" pools serve.
        """
        self._fleet = fleet
        self._pools = tuple(pools)
        self._pool_of = {model: pool.name for pool in self._pools for model in pool.models}

    def pool_of(self, model: str | None) -> str | Rejection:
        """Name the pool that serves a model; None stands for a request that names no model."""
        if model is None:
            if len(self._pools) == 1:
                return self._pools[0].name
            message = f"several pools could be meant; name the model: {', '.join(self.known())}"
            return Rejection(400, Reason.MODEL_MISSING, message, param="model")
        return self._pool_of.get(model) or self._pool_of.get(_ANY_MODEL) or self._unknown(model)

    def known(self) -> list[str]:
        """Name every model that can be asked for: the configured ones, and what the engines of "*" pools serve."""
        known: dict[str, None] = {}
        for pool in self._pools:
            for model in pool.models:
                if model != _ANY_MODEL:
                    known[model] = None
                    continue
                for host in self._fleet.discovered_in(pool.name):
                    if host.facts.served_model and host.facts.served_model not in self._pool_of:
                        known[host.facts.served_model] = None
        return list(known)

    def answer(self, path: str) -> Answer | Rejection:
        """Answer ``/v1/models`` for all pools, or ``/v1/models/NAME``."""
        cards = [
            {"id": model, "object": "model", "created": 0, "owned_by": "sglang", "root": model, "parent": None}
            for model in self.known()
        ]
        plain = path.partition("?")[0]
        if not plain.startswith(ONE_MODEL):
            return Answer(msgspec.json.encode({"object": "list", "data": cards}))
        wanted = unquote(plain.removeprefix(ONE_MODEL))  # clients send org%2Fname
        for card in cards:
            if card["id"] == wanted:
                return Answer(msgspec.json.encode(card))
        return self._unknown(wanted)

    def _unknown(self, model: str) -> Rejection:
        message = f"the model {model[:SHOWN_MODEL]!r} does not exist; known: {', '.join(self.known())}"
        return Rejection(404, Reason.MODEL_NOT_FOUND, message, param="model")
