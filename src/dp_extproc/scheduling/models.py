"""The models that can be asked for: the pool of each, and the answers to ``/v1/models``.

A name is matched as engines do it:

1. A configured name is that of its pool, whatever colons it has.
2. ``base:adapter`` is SGLang's name of an adapter (``_parse_model_parameter`` of ``serving_base.py``, from 0.5.4 on).
   The base is a configured name, or ``default``.
3. The name of an adapter that an engine lists is in the pool of that engine.
4. ``default`` is SGLang's name for the model that is there, like no name at all.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from dp_extproc.config.pools import EngineKind, PoolConfig
from dp_extproc.engines.model import ModelCard
from dp_extproc.load.cache import LoadCache
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.request.routes import ONE_MODEL
from dp_extproc.scheduling.decision import Answer

_ANY_MODEL: Final = "*"
_DEFAULT: Final = "default"
"""SGLang's ``DEFAULT_MODEL_NAME``, which stands in requests that name no model."""
_UNKNOWN_OWNER: Final = EngineKind.SGLANG.value
"""Owner of a model before any of its engines was reached."""
_LENGTH: Final = "max_model_len"
SHOWN_MODEL: Final = 200
"""Bounds the characters of a model name in logs and messages, as clients may send megabytes."""


class ModelRegistry:
    """Finds the pool of a model, and lists the models."""

    __slots__ = ("_adapters", "_generation", "_load", "_pool_of", "_pools")

    def __init__(self, pools: Iterable[PoolConfig], load: LoadCache) -> None:
        """Index the models of the pools; *load* has what their engines list."""
        self._load = load
        self._pools = tuple(pools)
        self._pool_of = {model: pool.name for pool in self._pools for model in pool.models}
        self._adapters: dict[str, str] = {}
        """The pool of each adapter that an engine lists, as of a generation of the load cache."""
        self._generation = -1

    def pool_of(self, model: str | None) -> str | Rejection:
        """Return the name of the pool that serves a model, or the refusal; no model (None) means the only pool."""
        if model is None:
            return self._pool_without_name()
        if (exact := self._pool_of.get(model)) is not None and model != _ANY_MODEL:
            return exact
        if ":" in model and (found := self._pool_of_base(model)) is not None:
            return found
        return (
            self._listed_adapters().get(model)
            or self._pool_of.get(_ANY_MODEL)
            or (self._pool_without_name() if model == _DEFAULT else self._unknown(model))
        )

    def _pool_without_name(self) -> str | Rejection:
        if len(self._pools) == 1:
            return self._pools[0].name
        message = f"several pools could be meant; name the model: {', '.join(self.known())}"
        return Rejection(400, Reason.MODEL_MISSING, message, param="model")

    def _pool_of_base(self, model: str) -> str | Rejection | None:
        """Return the pool of the base of ``base:adapter``; None if it has no known base. The longest base counts."""
        end = model.rfind(":")
        while end >= 0:
            base = model[:end].strip()
            if base in self._pool_of and base != _ANY_MODEL:
                return self._pool_of[base]
            if base == _DEFAULT and _ANY_MODEL not in self._pool_of:
                return self._pool_without_name()
            end = model.rfind(":", 0, end)
        return None

    def _listed_adapters(self) -> dict[str, str]:
        if self._generation != self._load.generation:
            self._generation = self._load.generation
            found = [(card.name, pool.name) for pool in self._pools for card in self._cards_of(pool) if card.parent]
            self._adapters = dict(reversed(found))
        return self._adapters

    def _cards_of(self, pool: PoolConfig) -> Iterator[ModelCard]:
        for endpoint in self._load.discovered_in(pool.name):
            yield from endpoint.facts.cards

    def known(self) -> list[str]:
        """Return every model that can be asked for: the configured ones, and those that engines list."""
        return list(self._cards())

    def _cards(self) -> dict[str, dict[str, Any]]:
        """Return the card of every model, as its engines list it."""
        known: dict[str, dict[str, Any]] = {}
        for pool in self._pools:
            listed: dict[str, dict[str, Any]] = {}
            for card in self._cards_of(pool):
                _merge(listed.setdefault(card.name, {}), card)
            bases = {name: members for name, members in listed.items() if not members.get("parent")}
            for model in pool.models:
                if model != _ANY_MODEL:
                    members = bases.get(model) or next(iter(bases.values()), {})
                    known[model] = {**self._plain_card(model, pool), **members, "id": model}
            if _ANY_MODEL in pool.models:
                for model in self._reported(pool, bases):
                    known.setdefault(model, {**self._plain_card(model, pool), **bases.get(model, {})})
            parent = {} if _ANY_MODEL in pool.models else {"parent": pool.models[0]}
            for name, members in listed.items():
                if name not in bases:
                    known.setdefault(name, {**self._plain_card(name, pool), **members, **parent})
        return known

    def _reported(self, pool: PoolConfig, bases: Iterable[str]) -> Iterator[str]:
        """Name the models that engines of a "*" pool report, and that no pool is configured for."""
        served = (each.facts.served_model for each in self._load.discovered_in(pool.name))
        yield from (model for model in (*bases, *served) if model and model not in self._pool_of)

    def _plain_card(self, model: str, pool: PoolConfig) -> dict[str, Any]:
        """Return the card of a model whose engines list none. Its owner is the kind of its engines."""
        kinds = [each.facts.kind.lower() for each in self._load.discovered_in(pool.name)]
        configured = _UNKNOWN_OWNER if pool.engine is EngineKind.AUTO else pool.engine.value
        owner = kinds[0] if kinds else configured
        return {"id": model, "object": "model", "created": 0, "owned_by": owner, "root": model, "parent": None}

    def answer(self, path: str) -> Answer | Rejection:
        """Answer ``/v1/models`` for all pools, or ``/v1/models/NAME``."""
        cards = self._cards()
        plain = path.partition("?")[0]
        if not plain.startswith(ONE_MODEL.path):
            return Answer(msgspec.json.encode({"object": "list", "data": list(cards.values())}))
        wanted = unquote(plain.removeprefix(ONE_MODEL.path))  # clients send org%2Fname
        return Answer(msgspec.json.encode(cards[wanted])) if wanted in cards else self._unknown(wanted)

    def _unknown(self, model: str) -> Rejection:
        message = f"the model {model[:SHOWN_MODEL]!r} does not exist; known: {', '.join(self.known())}"
        return Rejection(404, Reason.MODEL_NOT_FOUND, message, param="model")


def _merge(members: dict[str, Any], card: ModelCard) -> None:
    """Take over the members of a card that an earlier one of the same model has not; the shortest length counts."""
    own: dict[str, Any] = msgspec.json.decode(card.members)
    lengths = [each for each in (members.get(_LENGTH), own.get(_LENGTH)) if isinstance(each, int)]
    for name, value in own.items():
        members.setdefault(name, value)
    if lengths:
        members[_LENGTH] = min(lengths)
