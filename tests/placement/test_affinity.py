"""The index tells who holds what beginning, never more than was sent there."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dp_extproc.placement.affinity import PrefixIndex
from dp_extproc.request.prefix import NO_PREFIX, Prefix


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
    assert sum(map(len, index._holders.values())) == sum(len(cache.blocks) for cache in index._caches.values())
