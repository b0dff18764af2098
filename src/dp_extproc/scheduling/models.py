"""The models that can be asked for: the pool of each, and the answers to ``/v1/models``."""

from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

import msgspec

from dp_extproc.config.pools import EngineKind, PoolConfig
from dp_extproc.load.cache import LoadCache
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import ONE_MODEL
from dp_extproc.scheduling.decision import Answer

_ANY_MODEL: Final = "*"
_UNKNOWN_OWNER: Final = EngineKind.SGLANG.value
"""Owner of a model before any of its engines was reached."""
SHOWN_MODEL: Final = 200
"""Bounds the characters of a model name in logs and messages, as clients may send megabytes."""


class ModelRegistry:
    """Finds the pool of a model, and lists the models."""

    __slots__ = ("_load", "_pool_of", "_pools")

    def __init__(self, pools: Iterable[PoolConfig], load: LoadCache) -> None:
        """Index the models of the pools; *load* contains those that the engines of "*" pools report."""
        self._load = load
        self._pools = tuple(pools)
        self._pool_of = {model: pool.name for pool in self._pools for model in pool.models}

    def pool_of(self, model: str | None) -> str | Rejection:
        """Return the name of the pool that serves a model, or the refusal; no model (None) means the only pool."""
        if model is None:
            if len(self._pools) == 1:
                return self._pools[0].name
            message = f"several pools could be meant; name the model: {', '.join(self.known())}"
            return Rejection(400, Reason.MODEL_MISSING, message, param="model")
        return self._pool_of.get(model) or self._pool_of.get(_ANY_MODEL) or self._unknown(model)

    def known(self) -> list[str]:
        """Return every model that can be asked for: the configured ones, and those that engines of "*" pools report."""
        return list(self._owners())

    def _owners(self) -> dict[str, str]:
        """Return the owner of every model: the kind of its engines, as they themselves report it on this path."""
        known: dict[str, str] = {}
        for pool in self._pools:
            kinds = [each.facts.kind.lower() for each in self._load.discovered_in(pool.name)]
            configured = _UNKNOWN_OWNER if pool.engine is EngineKind.AUTO else pool.engine.value
            for model in pool.models:
                if model != _ANY_MODEL:
                    known[model] = kinds[0] if kinds else configured
                    continue
                for endpoint in self._load.discovered_in(pool.name):
                    if endpoint.facts.served_model and endpoint.facts.served_model not in self._pool_of:
                        known[endpoint.facts.served_model] = endpoint.facts.kind.lower()
        return known

    def answer(self, path: str) -> Answer | Rejection:
        """Answer ``/v1/models`` for all pools, or ``/v1/models/NAME``."""
        cards = [
            {"id": model, "object": "model", "created": 0, "owned_by": owner, "root": model, "parent": None}
            for model, owner in self._owners().items()
        ]
        plain = path.partition("?")[0]
        if not plain.startswith(ONE_MODEL.path):
            return Answer(msgspec.json.encode({"object": "list", "data": cards}))
        wanted = unquote(plain.removeprefix(ONE_MODEL.path))  # clients send org%2Fname
        for card in cards:
            if card["id"] == wanted:
                return Answer(msgspec.json.encode(card))
        return self._unknown(wanted)

    def _unknown(self, model: str) -> Rejection:
        message = f"the model {model[:SHOWN_MODEL]!r} does not exist; known: {', '.join(self.known())}"
        return Rejection(404, Reason.MODEL_NOT_FOUND, message, param="model")
