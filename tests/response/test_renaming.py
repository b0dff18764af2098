"""The ids of a client in place of those of the decode leg."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_extproc.response.renaming import Renamer, Renames

ONE = Renames("dp0123d", (b'my \\"id\\"',), is_batch=False)
BATCH = Renames("dp0123d", (b"a", b"b"), is_batch=True)
CASES = {
    "one": (ONE, b'{"id":"dp0123d"} dp012 d dp0123d dp', b'{"id":"my \\"id\\""} dp012 d my \\"id\\" dp'),
    "batch": (
        BATCH,
        b'["dp0123d-0.","dp0123d-1.","dp0123d-17.","dp0123d-12345678","dp0123d","dp0123d-',
        b'["a","b","dp0123d-17.","dp0123d-12345678","dp0123d","dp0123d-',
    ),
}


@pytest.mark.parametrize(("renames", "text", "expected"), CASES.values(), ids=CASES)
@given(cuts=st.lists(st.integers(0, 100), max_size=12))
def test_ids_are_renamed_however_a_response_is_cut(
    renames: Renames, text: bytes, expected: bytes, cuts: list[int]
) -> None:
    """An id may begin in one piece of the body, and end in a later one."""
    renamer = Renamer(renames)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [renamer.feed(text[begin:end], end_of_stream=False) for begin, end in pairwise(places)]

    assert b"".join([*pieces, renamer.feed(b"", end_of_stream=True)]) == expected


def test_only_the_start_of_an_id_is_held() -> None:
    """Events go on at once."""
    renamer = Renamer(ONE)

    assert renamer.feed(b"data: 1\n\ndp0", end_of_stream=False) == b"data: 1\n\n"
    assert renamer.feed(b"x", end_of_stream=False) == b"dp0x"
