"""Whatever a document contains, an audit ends with findings or with a refusal."""

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dp_extproc.envoy_check import UnreadableError
from envoy_check.samples import bootstrap_of, dump_of, example_config, found_in

KEYS = st.text(max_size=5) | st.just("@type")
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("type.googleapis.com/x.Y"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a tree with each of its keys or indexes."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from _places(data[key])


SAMPLE = dump_of(bootstrap_of(example_config()), dynamic=True)
COUNT = sum(1 for _ in _places(SAMPLE))


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, COUNT - 1), JUNK), min_size=1, max_size=3))
def test_any_values_in_a_dump_raise_nothing_else(changes: list[tuple[int, Any]]) -> None:
    """Some values of a dump are replaced by others of any type."""
    dump = deepcopy(SAMPLE)
    places = list(_places(dump))
    for number, value in changes:
        container, key = places[number]
        container[key] = value

    with suppress(UnreadableError):
        found_in(example_config(), dump)


@given(JUNK)
def test_any_document_raises_nothing_else(document: Any) -> None:
    """A document need not look like an Envoy at all."""
    with suppress(UnreadableError):
        found_in(example_config(), document)
