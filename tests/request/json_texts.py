"""Texts of JSON objects in every spelling that RFC 8259 allows, and a slow way to read them."""

import json
from typing import Any

from hypothesis import strategies as st

from dp_extproc.request.rewrite import LEG_KEYS

Pairs = list[tuple[str, Any]]


def read_pairs(text: bytes) -> Pairs:
    """Read an object as its members in their order; numbers stay as they are spelt."""
    pairs: Pairs = json.loads(text, object_pairs_hook=lambda members: members, parse_int=str, parse_float=str)
    return pairs


@st.composite
def _escaped(draw: st.DrawFn, text: str) -> str:
    """Spell a string with any of its characters escaped."""
    spelt = ""
    for character in text:
        if draw(st.integers(0, 3)) == 0:
            units = character.encode("utf-16-be")
            digits = [units[start : start + 2].hex() for start in range(0, len(units), 2)]
            spelt += "".join("\\u" + (each.upper() if draw(st.booleans()) else each) for each in digits)
        else:
            spelt += json.dumps(character, ensure_ascii=draw(st.booleans()))[1:-1]
    return f'"{spelt}"'


_unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_leg_keys = st.sampled_from(sorted(LEG_KEYS))
_near_leg_keys = st.sampled_from(["Rid", "rid ", "streams", "stream_option", "bootstrap", "routed_dp_rank\0", ""])
_strings = st.one_of(_unicode, _leg_keys, st.sampled_from(['"', "\\", "\\u0072id", "},{", '":', "é漢🦊"])).flatmap(
    _escaped
)
_numbers = st.one_of(
    st.sampled_from(["0", "-0", "-0.0", "1.0e+5", "1E400", "-1e-400", "0.10", "1e0", "123456789012345678901234567890"]),
    st.from_regex(r"\A-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,9})?([eE][+-]?[0-9]{1,3})?\Z"),
)
_space = st.text(" \t\n\r", max_size=2)


@st.composite
def _list(draw: st.DrawFn, items: st.SearchStrategy[str]) -> str:
    inner = ",".join(draw(_space) + item + draw(_space) for item in draw(st.lists(items, max_size=3)))
    return f"[{inner or draw(_space)}]"


@st.composite
def _member(draw: st.DrawFn, values: st.SearchStrategy[str]) -> tuple[str, str]:
    """Draw a member with the white space around it: its key, and its text."""
    key = draw(st.one_of(_leg_keys, _near_leg_keys, _unicode))
    space = [draw(_space) for _ in range(4)]
    return key, space[0] + draw(_escaped(key)) + space[1] + ":" + space[2] + draw(values) + space[3]


@st.composite
def _nested_object(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    inner = ",".join(text for _, text in draw(st.lists(_member(values), max_size=3)))
    return f"{{{inner or draw(_space)}}}"


_values = st.recursive(
    st.one_of(_strings, _numbers, st.sampled_from(["true", "false", "null"])),
    lambda values: st.one_of(_list(values), _nested_object(values)),
    max_leaves=6,
)


class ObjectText:
    """The text of an object, and the parts it was made of."""

    def __init__(self, lead: str, members: list[tuple[str, str]], empty: str, trail: str) -> None:
        self.members = members
        self.empty = empty
        """The white space between the braces of an object without members."""
        self.trail = trail
        inner = ",".join(text for _, text in members) if members else empty
        self.text = f"{lead}{{{inner}}}{trail}".encode()

    def __repr__(self) -> str:
        return f"ObjectText({self.text!r})"

    def kept(self, unwanted: frozenset[str]) -> list[str]:
        """The texts of the members that stay."""
        return [text for key, text in self.members if key not in unwanted]

    def behind_the_brace(self, unwanted: frozenset[str]) -> bytes:
        """The expected text behind the opening brace."""
        inner = ",".join(self.kept(unwanted)) if self.members else self.empty
        return f"{inner}}}{self.trail}".encode()


objects = st.builds(ObjectText, _space, st.lists(_member(_values), max_size=7), _space, _space)
"""Any object, with many leg keys among its keys and inside its values."""
