"""Cache the prefixes of one DP rank: a radix tree of the prompts whose KV cache is still there.

After SGLang's ``mem_cache/radix_cache.py`` with pages of one token and its default eviction, least recently used:

- A node stands for some tokens behind those of its parent, so two prompts share what they begin with, token by token.
- What a running sequence uses is locked, from its node up to the root. Everything else may be evicted for new tokens,
  whole leaves at a time.
- Looking a prompt up, and inserting it, makes all of its nodes the most recently used.

A prompt is the bytes of its tokens here, :data:`TOKEN_BYTES` each. Bytes, because comparing long prompts is then one
``memcmp`` and a slice is a plain copy.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

TOKEN_BYTES: Final = 4


def prompt_of(parts: Iterable[tuple[int, int]]) -> bytes:
    """Make up a prompt for a simulation that has no texts.

    Args:
        parts: What the prompt consists of, in order: the number of a text, below 2**32, and how many tokens of that
            text are here. Prompts share what they have in common of such parts, from the beginning.
    """
    return b"".join(number.to_bytes(TOKEN_BYTES, "little") * tokens for number, tokens in parts)


@dataclass(slots=True, eq=False)
class Node:
    """Some tokens in the cache, behind those of their parent. To callers it stands for the prefix that ends with it."""

    tokens: bytes
    parent: "Node | None"
    end: int
    """Length of the prefix, in tokens."""
    used_at: int
    """Moment of the last use on the cache's own clock, which ticks with every use."""
    users: int = 0
    """Sequences that use this prefix or a longer one."""
    children: "dict[bytes, Node]" = field(default_factory=dict)
    """Children by their first token."""
    is_candidate: bool = False
    """Whether the cache has listed it for eviction."""

    @property
    def size(self) -> int:
        """Count the tokens of the node itself."""
        return len(self.tokens) // TOKEN_BYTES


class PrefixCache:
    """Hold the prompts that a rank has computed and not evicted. Sizes are in tokens."""

    def __init__(self) -> None:
        """Start empty."""
        self._root = Node(b"", None, 0, 0)
        self._clock = 0
        self._candidates: list[tuple[int, int, int, Node]] = []
        """A heap of nodes that were unlocked leaves when they were listed: the last use then, the end, and a number, as
        two branches of a split may share both. Later changes are checked when a node comes out."""
        self._noted = 0
        self.size = 0
        self.locked = 0
        """Part of the size that running sequences lock."""

    @property
    def evictable(self) -> int:
        """Return the part of the size that can be evicted."""
        return self.size - self.locked

    def match(self, prompt: bytes, longest: int) -> Node:
        """Find the longest cached prefix of *prompt*, of at most *longest* tokens."""
        return self._descend(prompt[: longest * TOKEN_BYTES])

    def insert(self, prompt: bytes) -> Node:
        """Keep the tokens of *prompt*; cached ones are not added again."""
        node = self._descend(prompt)
        rest = prompt[node.end * TOKEN_BYTES :]
        if not rest:
            return node
        leaf = Node(rest, node, len(prompt) // TOKEN_BYTES, self._clock)
        node.children[rest[:TOKEN_BYTES]] = leaf
        self.size += leaf.size
        self._note(leaf)
        return leaf

    def lock(self, node: Node) -> None:
        """Lock a prefix: it stays until :meth:`unlock`."""
        for each in self._path(node):
            if not each.users:
                self.locked += each.size
            each.users += 1

    def unlock(self, node: Node) -> None:
        """Unlock a prefix."""
        for each in self._path(node):
            each.users -= 1
            if not each.users:
                self.locked -= each.size
                self._note(each)

    def evict(self, tokens: int) -> None:
        """Evict leaves, the least recently used first, until *tokens* are free or nothing is left."""
        while tokens > 0 and self._candidates:
            noted, _, _, leaf = heapq.heappop(self._candidates)
            leaf.is_candidate = False
            if noted != leaf.used_at:  # used since: it gets its new place
                self._note(leaf)
            elif not leaf.users and not leaf.children:
                self._remove(leaf)
                tokens -= leaf.size

    def _note(self, node: Node) -> None:
        """List a node for eviction, if it is an unlocked leaf and not the root."""
        if node.parent is not None and not (node.users or node.children or node.is_candidate):
            node.is_candidate = True
            self._noted += 1
            heapq.heappush(self._candidates, (node.used_at, node.end, self._noted, node))

    def _remove(self, leaf: Node) -> None:
        assert leaf.parent is not None  # noqa: S101 - the root is no candidate: for the type checker
        del leaf.parent.children[leaf.tokens[:TOKEN_BYTES]]
        self.size -= leaf.size
        self._note(leaf.parent)

    def _descend(self, prompt: bytes) -> Node:
        """Follow a prompt as far as it is cached; a node that it leaves in the middle is split there."""
        self._clock += 1
        node, at = self._root, 0
        while at < len(prompt) and (child := node.children.get(prompt[at : at + TOKEN_BYTES])) is not None:
            child.used_at = self._clock
            common = _common(prompt, at, child.tokens)
            if common < len(child.tokens):
                return self._split(child, common)
            node, at = child, at + common
        return node

    def _split(self, child: Node, at: int) -> Node:
        parent = child.parent
        assert parent is not None  # noqa: S101 - the root is never split: for the type checker
        upper = Node(child.tokens[:at], parent, parent.end + at // TOKEN_BYTES, child.used_at, child.users)
        parent.children[upper.tokens[:TOKEN_BYTES]] = upper
        child.tokens, child.parent = child.tokens[at:], upper
        upper.children[child.tokens[:TOKEN_BYTES]] = child
        return upper

    def _path(self, node: Node) -> list[Node]:
        """List a node and its ancestors, without the root."""
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path


def _common(prompt: bytes, at: int, tokens: bytes) -> int:
    """Count the bytes that *tokens* and *prompt* at *at* have in common, in whole tokens."""
    if prompt.startswith(tokens, at):
        return len(tokens)
    low, high = 0, min(len(tokens), len(prompt) - at) // TOKEN_BYTES
    while low < high:  # the first *low* tokens are the same, those behind *high* are not looked at
        middle = (low + high + 1) // 2
        begin, end = low * TOKEN_BYTES, middle * TOKEN_BYTES
        if prompt[at + begin : at + end] == tokens[begin:end]:
            low = middle
        else:
            high = middle - 1
    return low * TOKEN_BYTES
