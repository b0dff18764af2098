"""The index estimates which rank has which prefix cached, and never more than it got."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix
from dp_extproc.prefix_cache.index import PrefixIndex


def make_prefix(words: str, block: int = 100) -> Prefix:
    """Make a prefix with a block for each letter."""
    blocks = tuple(hash(words[: end + 1]) & (1 << 64) - 1 for end in range(len(words)))
    return Prefix(blocks, tuple(block * (end + 1) for end in range(len(words))))


def test_the_longest_prefix_counts() -> None:
    """Rank 1 has the first two of four blocks, rank 2 three of them, rank 3 none."""
    index = PrefixIndex[int]()
    index.note(1, make_prefix("abx"), 300, None)
    index.note(2, make_prefix("abcy"), 400, None)
    index.note(3, make_prefix("bcd"), 300, None)
    cached = index.cached(make_prefix("abcd"), 1000)

    assert cached.by_rank == {2: 750, 1: 500}
    assert cached.elsewhere == 0


def test_an_unknown_prompt_is_cached_nowhere() -> None:
    """None of its blocks was recorded."""
    cached = PrefixIndex[int]().cached(make_prefix("abc"), 1000)

    assert (cached.by_rank, cached.elsewhere) == ({}, 0)


def test_the_end_of_the_least_recently_used_prompt_is_evicted_first() -> None:
    """With room for five blocks, a second prompt of three evicts the end of the first, not its beginning."""
    index = PrefixIndex[int]()
    index.note(1, make_prefix("abcd"), 400, 500)
    index.note(1, make_prefix("xyz"), 300, 500)

    assert index.cached(make_prefix("abcd"), 400).by_rank == {1: 200}
    assert index.cached(make_prefix("xyz"), 300).by_rank == {1: 300}


def test_ranks_are_listed_in_the_order_in_which_they_were_recorded() -> None:
    """Ties are drawn in it, so a simulation depends on nothing but its seed."""
    index = PrefixIndex[object]()
    ranks = [object() for _ in range(40)]  # in a set they would be in the order of their addresses
    ranks.sort(key=lambda rank: hash(rank) % 7)
    for rank in ranks:
        index.note(rank, make_prefix("ab"), 200, None)

    assert [*index.cached(make_prefix("ab"), 200).by_rank] == ranks


def test_a_restarted_rank_has_nothing_cached() -> None:
    """Its prompts and sessions are dropped; those of other ranks stay."""
    index = PrefixIndex[int]()
    for rank in (1, 2):
        index.note(rank, make_prefix("ab"), 200, None)
        index.note_session(f"s{rank}", rank, 200)
    index.forget(1)

    assert index.cached(make_prefix("ab"), 200).by_rank == {2: 200}
    assert index.cached(NO_PREFIX, 200, "s1").by_rank == {}
    assert index.cached(NO_PREFIX, 200, "s2").by_rank == {2: 200}


def test_a_prefix_that_nearly_all_ranks_have_counts_for_all() -> None:
    """A system prompt on a hundred ranks lists none of them; a rank with a longer prefix is listed."""
    index = PrefixIndex[int]()
    for rank in range(100):
        index.note(rank, make_prefix("sy" + chr(200 + rank)), 300, None)
    cached = index.cached(make_prefix("sy" + chr(207)), 300)

    assert cached.by_rank == {7: 300}
    assert cached.elsewhere == 200


def test_a_session_counts_as_its_last_prompt() -> None:
    """Blocks may show a longer prefix; and no session has more tokens than the prompt."""
    index = PrefixIndex[int]()
    index.note_session("s", 1, 800)
    index.note(1, make_prefix("abc"), 300, None)

    assert index.cached(NO_PREFIX, 1000, "s").by_rank == {1: 800}
    assert index.cached(NO_PREFIX, 500, "s").by_rank == {1: 500}
    assert index.cached(make_prefix("abc"), 900, "s").by_rank == {1: 900}
    assert index.cached(NO_PREFIX, 1000, "t").by_rank == {}


PROMPTS = st.text("ab", min_size=1, max_size=8)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), PROMPTS), max_size=30), PROMPTS)
def test_the_index_is_exact_while_nothing_is_evicted(sent: list[tuple[int, str]], asked: str) -> None:
    """Compared with all recorded prompts: the longest common prefix with any of them."""
    index = PrefixIndex[int]()
    for rank, words in sent:
        index.note(rank, make_prefix(words), 100 * len(words), None)
    cached = index.cached(make_prefix(asked), 100 * len(asked)).by_rank

    truth: dict[int, int] = {}
    for rank, words in sent:
        length = next(
            (n for n, (a, b) in enumerate(zip(words, asked, strict=False)) if a != b), min(len(words), len(asked))
        )
        truth[rank] = max(truth.get(rank, 0), 100 * length)
    assert {rank: round(tokens) for rank, tokens in cached.items()} == {rank: n for rank, n in truth.items() if n}


def test_a_session_whose_prompt_was_evicted_has_nothing_cached() -> None:
    """After as many tokens as the rank has KV cache, nothing of it is left."""
    index = PrefixIndex[int]()
    index.note(1, NO_PREFIX, 400, 1000)
    index.note_session("s", 1, 400)
    index.note(1, NO_PREFIX, 900, 1000)
    before = index.cached(NO_PREFIX, 400, "s").by_rank
    index.note(1, NO_PREFIX, 200, 1000)

    assert before == {1: 400}
    assert index.cached(NO_PREFIX, 400, "s").by_rank == {}


def test_a_session_moves_with_its_last_prompt() -> None:
    """It is dropped with the rank that it moved to, not with the one before."""
    index = PrefixIndex[int]()
    index.note_session("s", 1, 400)
    index.note_session("s", 2, 500)
    index.forget(1)
    before = index.cached(NO_PREFIX, 400, "s").by_rank
    index.forget(2)

    assert before == {2: 400}
    assert index.cached(NO_PREFIX, 400, "s").by_rank == {}


def test_a_prefix_that_many_but_not_most_ranks_have_lists_some_of_them() -> None:
    """Of 200 ranks 70 have it: 64 are listed, and no other rank counts."""
    index = PrefixIndex[int]()
    for rank in range(200):
        index.note(rank, make_prefix("sy" if rank < 70 else "xz" + chr(200 + rank)), 200, None)
    cached = index.cached(make_prefix("sy"), 200)

    assert len(cached.by_rank) == 64
    assert set(cached.by_rank.values()) == {200}
    assert cached.elsewhere == 0


def test_cuts_that_only_some_prompts_have_are_found() -> None:
    """A later turn has no cut where an earlier prompt ended, or the other way round: the last common one counts."""
    index = PrefixIndex[int]()
    index.note(1, Prefix((11, 12, 13), (100, 250, 300)), 300, None)

    assert index.cached(Prefix((11, 99, 13, 14), (100, 200, 300, 400)), 400).by_rank == {1: 300}


def test_all_ranks_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """New prompts evict those of the ranks whose last request is oldest."""
    monkeypatch.setattr("dp_extproc.prefix_cache.index._MOST_BLOCKS_IN_ALL", 40)
    index = PrefixIndex[int]()
    index.note_session("s", 99, 400)  # a rank with nothing to give
    for rank in range(10):
        index.note(rank, make_prefix(f"{rank}abc"), 400, None)
    index.note(0, make_prefix("0a"), 200, None)
    index.note(9, make_prefix("xyz"), 300, None)

    left = [len(index.cached(make_prefix(f"{rank}abc"), 400).by_rank) for rank in range(10)]
    assert left == [1] * 10
    assert index.cached(make_prefix("xyz"), 300).by_rank == {9: 300}
    assert index.cached(make_prefix("1abc"), 400).by_rank == {1: 100}
    assert index.cached(make_prefix("2abc"), 400).by_rank == {2: 400}
    assert sum(len(cache.blocks) for cache in index._caches.values()) == 40


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), PROMPTS), max_size=60), st.integers(1, 20))
def test_a_rank_never_exceeds_its_capacity(sent: list[tuple[int, str]], blocks: int) -> None:
    """With every evicted block its ranks are dropped."""
    index = PrefixIndex[int]()
    for rank, words in sent:
        index.note(rank, make_prefix(words), 100 * len(words), 100 * blocks)

    for rank, cache in index._caches.items():
        assert len(cache.blocks) <= blocks
        assert abs(cache.tokens - sum(cache.blocks.values())) < 1e-6
        assert all(rank in index._holders[block] for block in cache.blocks)
    kept = sum(len(cache.blocks) for cache in index._caches.values())
    assert index._blocks == kept == sum(map(len, index._holders.values()))


def test_share_of_a_rank_scales_its_cached_tokens_until_it_is_forgotten() -> None:
    """An engine that finds a half of what the index has gets half of the credit."""
    index = PrefixIndex[int]()
    for rank in (1, 2):
        index.note(rank, make_prefix("abcd"), 400, None)
    index.trust(1, 0.5)

    assert index.cached(make_prefix("abcd"), 400).by_rank == {1: 200, 2: 400}
    assert (index.share(1), index.share(2)) == (0.5, 1.0)
    index.forget(1)
    index.note(1, make_prefix("abcd"), 400, None)
    assert index.cached(make_prefix("abcd"), 400).by_rank == {1: 400, 2: 400}
