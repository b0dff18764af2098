"""Compare the radix tree of prompts with a naive model."""

import math
import struct
from collections.abc import Iterator
from typing import TypeAlias

from hypothesis import example, given
from hypothesis import strategies as st

from dp_extproc.lab.engine.scheduler.prefix_cache import TOKEN_BYTES, Node, PrefixCache, prompt_of

Tokens: TypeAlias = tuple[int, ...]

SHORT = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
"""Of three tokens only, so that most prompts begin alike."""
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), SHORT),
        st.tuples(st.just("match"), SHORT, st.integers(0, 8)),
        st.tuples(st.just("lock"), SHORT),
        st.tuples(st.just("unlock"), st.integers(0, 5)),
        st.tuples(st.just("evict"), st.integers(1, 12)),
    ),
    max_size=40,
)


def prompt(*tokens: int) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


class Model:
    """Hold every cached prefix as a tuple of its own, and how many lock it."""

    def __init__(self) -> None:
        self.cache = PrefixCache()
        self.known: set[Tokens] = set()
        self.held: list[tuple[Node, Tokens]] = []

    def step(self, what: str, *given: object) -> None:
        getattr(self, what)(*given)
        locked = {each for _, held in self.held for each in prefixes(held)}
        assert (self.cache.size, self.cache.locked) == (len(self.known), len(locked))
        assert self.cache.evictable == len(self.known - locked)

    def insert(self, tokens: Tokens) -> None:
        assert self.cache.insert(prompt(*tokens)).end == len(tokens)
        self.known |= prefixes(tokens)

    def match(self, tokens: Tokens, longest: int) -> None:
        assert self.cache.match(prompt(*tokens), longest).end == len(prefixes(tokens[:longest]) & self.known)

    def lock(self, tokens: Tokens) -> None:
        node = self.cache.match(prompt(*tokens), len(tokens))
        self.cache.lock(node)
        self.held.append((node, tokens[: node.end]))

    def unlock(self, index: int) -> None:
        if index < len(self.held):
            node, _ = self.held.pop(index)
            self.cache.unlock(node)

    def evict(self, tokens: int) -> None:
        before, could, nodes = self.cache.size, self.cache.evictable, set(below(self.cache._root))
        self.cache.evict(tokens)
        gone = nodes - set(below(self.cache._root))
        kept = [node for node in nodes - gone if not node.users and not node.children]
        assert max((node.used_at for node in gone), default=0) <= min((node.used_at for node in kept), default=math.inf)
        left = {each for each in self.known if self.cache.match(prompt(*each), len(each)).end == len(each)}
        assert before - len(left) >= min(tokens, could)
        assert {each for _, held in self.held for each in prefixes(held)} <= left
        self.known = left


def below(node: Node) -> Iterator[Node]:
    for child in node.children.values():
        yield child
        yield from below(child)


def prefixes(tokens: Tokens) -> set[Tokens]:
    return {tokens[:end] for end in range(1, len(tokens) + 1)}


@given(STEPS)
@example([("insert", (0, 0)), ("insert", (0, 1)), ("evict", 1)])  # two leaves of one length, used in one moment
def test_it_knows_what_a_naive_model_knows(steps: list[tuple[object, ...]]) -> None:
    """Lengths, sizes and locks agree after every step; eviction frees enough, oldest first, and takes nothing held."""
    model = Model()
    for what, *given_ in steps:
        model.step(str(what), *given_)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), min_size=2, max_size=6))
def test_long_prompts_part_at_the_right_token(lengths: list[tuple[int, int]]) -> None:
    """Two prompts share exactly the tokens that they begin with, wherever in a node they part."""
    cache = PrefixCache()
    first = prompt_of(lengths)
    cache.insert(first)
    for at in range(0, len(first), TOKEN_BYTES * 7):
        other = first[:at] + prompt(9) + first[at + TOKEN_BYTES :]
        assert cache.match(other, len(other)).end == at // TOKEN_BYTES
    assert cache.size == len(first) // TOKEN_BYTES


def test_least_recently_used_leaf_is_evicted_first() -> None:
    """A lookup counts as use; a shared prefix outlives its leaves."""
    cache = PrefixCache()
    for last in (1, 2, 3):
        cache.insert(prompt(7, 7, last))
    cache.match(prompt(7, 7, 1), 3)
    cache.evict(1)
    found = {last: cache.match(prompt(7, 7, last), 3).end for last in (1, 2, 3)}

    assert found == {1: 3, 2: 2, 3: 3}
    cache.evict(2)
    assert cache.size == 2
    cache.evict(1)
    assert cache.size == 0


def test_leaf_is_evicted_as_a_whole() -> None:
    """For one token the cache evicts all of the oldest leaf, as SGLang's does."""
    cache = PrefixCache()
    cache.insert(prompt(*range(100)))
    cache.evict(1)

    assert cache.size == 0


def test_split_node_stays_locked_on_both_sides() -> None:
    """It is split while it is locked."""
    cache = PrefixCache()
    node = cache.insert(prompt(1, 2, 3, 4))
    cache.lock(node)
    assert cache.match(prompt(1, 2, 9), 3).end == 2
    cache.evict(4)
    assert (cache.size, cache.locked) == (4, 4)

    cache.unlock(node)
    cache.evict(4)
    assert (cache.size, cache.locked) == (0, 0)
