"""The index tells who holds what beginning, never more than was sent there."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_extproc.prefix_cache.blocks import NO_PREFIX, Prefix
from dp_extproc.prefix_cache.index import PrefixIndex


def make_prefix(words: str, block: int = 100) -> Prefix:
    """A chain with a block for each letter."""
    blocks = tuple(hash(words[: end + 1]) & (1 << 64) - 1 for end in range(len(words)))
    return Prefix(blocks, tuple(block * (end + 1) for end in range(len(words))))


def test_the_longest_beginning_counts() -> None:
    """Slot 1 has seen the first two of four blocks, slot 2 three of them, slot 3 none."""
    index = PrefixIndex[int]()
    index.note(1, make_prefix("abx"), 300, None)
    index.note(2, make_prefix("abcy"), 400, None)
    index.note(3, make_prefix("bcd"), 300, None)
    held = index.held(make_prefix("abcd"), 1000)

    assert held.by_slot == {2: 750, 1: 500}
    assert held.elsewhere == 0


def test_an_unknown_prompt_is_held_by_nobody() -> None:
    """Nothing is known of it."""
    held = PrefixIndex[int]().held(make_prefix("abc"), 1000)

    assert (held.by_slot, held.elsewhere) == ({}, 0)


def test_what_was_not_used_for_longest_goes_first_leaves_before_roots() -> None:
    """With room for five blocks, a second prompt of three pushes out the end of the first, not its beginning."""
    index = PrefixIndex[int]()
    index.note(1, make_prefix("abcd"), 400, 500)
    index.note(1, make_prefix("xyz"), 300, 500)

    assert index.held(make_prefix("abcd"), 400).by_slot == {1: 200}
    assert index.held(make_prefix("xyz"), 300).by_slot == {1: 300}


def test_holders_are_listed_in_the_order_in_which_they_were_noted() -> None:
    """Ties are drawn in it, so a simulation depends on nothing but its seed."""
    index = PrefixIndex[object]()
    slots = [object() for _ in range(40)]  # in a set they would be in the order of their addresses
    slots.sort(key=lambda slot: hash(slot) % 7)
    for slot in slots:
        index.note(slot, make_prefix("ab"), 200, None)

    assert [*index.held(make_prefix("ab"), 200).by_slot] == slots


def test_a_restarted_slot_holds_nothing() -> None:
    """Neither prompts nor sessions; others keep theirs."""
    index = PrefixIndex[int]()
    for slot in (1, 2):
        index.note(slot, make_prefix("ab"), 200, None)
        index.note_session(f"s{slot}", slot, 200)
    index.forget(1)

    assert index.held(make_prefix("ab"), 200).by_slot == {2: 200}
    assert index.held(NO_PREFIX, 200, "s1").by_slot == {}
    assert index.held(NO_PREFIX, 200, "s2").by_slot == {2: 200}


def test_what_nearly_all_hold_is_held_everywhere() -> None:
    """A system prompt on a hundred slots lists none of them; who holds more than that is listed."""
    index = PrefixIndex[int]()
    for slot in range(100):
        index.note(slot, make_prefix("sy" + chr(200 + slot)), 300, None)
    held = index.held(make_prefix("sy" + chr(207)), 300)

    assert held.by_slot == {7: 300}
    assert held.elsewhere == 200


def test_a_session_counts_as_its_last_prompt() -> None:
    """Where the text tells nothing; never more than the prompt has, and never less than the text tells."""
    index = PrefixIndex[int]()
    index.note_session("s", 1, 800)
    index.note(1, make_prefix("abc"), 300, None)

    assert index.held(NO_PREFIX, 1000, "s").by_slot == {1: 800}
    assert index.held(NO_PREFIX, 500, "s").by_slot == {1: 500}
    assert index.held(make_prefix("abc"), 900, "s").by_slot == {1: 900}
    assert index.held(NO_PREFIX, 1000, "t").by_slot == {}


PROMPTS = st.text("ab", min_size=1, max_size=8)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), PROMPTS), max_size=30), PROMPTS)
def test_it_tells_the_truth_while_nothing_is_evicted(sent: list[tuple[int, str]], asked: str) -> None:
    """Against all prompts that were sent: the longest common beginning with any of them."""
    index = PrefixIndex[int]()
    for slot, words in sent:
        index.note(slot, make_prefix(words), 100 * len(words), None)
    held = index.held(make_prefix(asked), 100 * len(asked)).by_slot

    truth: dict[int, int] = {}
    for slot, words in sent:
        length = next(
            (n for n, (a, b) in enumerate(zip(words, asked, strict=False)) if a != b), min(len(words), len(asked))
        )
        truth[slot] = max(truth.get(slot, 0), 100 * length)
    assert {slot: round(tokens) for slot, tokens in held.items()} == {slot: n for slot, n in truth.items() if n}


def test_a_session_whose_prompt_was_pushed_out_claims_nothing() -> None:
    """After as many tokens as the slot can hold, nothing of it is left."""
    index = PrefixIndex[int]()
    index.note(1, NO_PREFIX, 400, 1000)
    index.note_session("s", 1, 400)
    index.note(1, NO_PREFIX, 900, 1000)
    before = index.held(NO_PREFIX, 400, "s").by_slot
    index.note(1, NO_PREFIX, 200, 1000)

    assert before == {1: 400}
    assert index.held(NO_PREFIX, 400, "s").by_slot == {}


def test_a_session_moves_with_its_last_prompt() -> None:
    """It is forgotten with the slot that it moved to, not with the one before."""
    index = PrefixIndex[int]()
    index.note_session("s", 1, 400)
    index.note_session("s", 2, 500)
    index.forget(1)
    before = index.held(NO_PREFIX, 400, "s").by_slot
    index.forget(2)

    assert before == {2: 400}
    assert index.held(NO_PREFIX, 400, "s").by_slot == {}


def test_a_beginning_that_many_but_not_most_hold_lists_some_of_them() -> None:
    """Of 200 slots 70 hold it: 64 are listed, and nobody else is taken to hold it."""
    index = PrefixIndex[int]()
    for slot in range(200):
        index.note(slot, make_prefix("sy" if slot < 70 else "xz" + chr(200 + slot)), 200, None)
    held = index.held(make_prefix("sy"), 200)

    assert len(held.by_slot) == 64
    assert set(held.by_slot.values()) == {200}
    assert held.elsewhere == 0


def test_cuts_that_only_some_prompts_have_are_found() -> None:
    """A later turn has no cut where an earlier prompt ended, or the other way round: the deepest common one counts."""
    index = PrefixIndex[int]()
    index.note(1, Prefix((11, 12, 13), (100, 250, 300)), 300, None)

    assert index.held(Prefix((11, 99, 13, 14), (100, 200, 300, 400)), 400).by_slot == {1: 300}


def test_all_slots_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to one pushes out what those hold that were sent nothing for longest, the oldest first."""
    monkeypatch.setattr("dp_extproc.prefix_cache.index._MOST_BLOCKS_IN_ALL", 40)
    index = PrefixIndex[int]()
    index.note_session("s", 99, 400)  # a slot with nothing to give
    for slot in range(10):
        index.note(slot, make_prefix(f"{slot}abc"), 400, None)
    index.note(0, make_prefix("0a"), 200, None)
    index.note(9, make_prefix("xyz"), 300, None)

    left = [len(index.held(make_prefix(f"{slot}abc"), 400).by_slot) for slot in range(10)]
    assert left == [1] * 10
    assert index.held(make_prefix("xyz"), 300).by_slot == {9: 300}
    assert index.held(make_prefix("1abc"), 400).by_slot == {1: 100}
    assert index.held(make_prefix("2abc"), 400).by_slot == {2: 400}
    assert sum(len(cache.blocks) for cache in index._caches.values()) == 40


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), PROMPTS), max_size=60), st.integers(1, 20))
def test_a_slot_never_holds_more_than_its_capacity(sent: list[tuple[int, str]], blocks: int) -> None:
    """Whatever is sent, and with every block that is forgotten its holders are."""
    index = PrefixIndex[int]()
    for slot, words in sent:
        index.note(slot, make_prefix(words), 100 * len(words), 100 * blocks)

    for slot, cache in index._caches.items():
        assert len(cache.blocks) <= blocks
        assert abs(cache.tokens - sum(cache.blocks.values())) < 1e-6
        assert all(slot in index._holders[block] for block in cache.blocks)
    kept = sum(len(cache.blocks) for cache in index._caches.values())
    assert index._blocks == kept == sum(map(len, index._holders.values()))
