"""Test what the errors of engines have in common."""

import time

from dp_extproc.attempt.failures import _VARYING


def test_errors_are_alike_but_for_their_numbers_and_ids() -> None:
    """Words of hexadecimal letters alone are words."""
    assert _VARYING.sub(b"#", b"bad face 12 at 0xdeadbeef1, id a1b2c3 of cafe9x") == b"bad face # at #x#, id # of #x"


def test_letters_take_time_in_proportion_to_their_number() -> None:
    """An error repeats text of a client: in proportion to the square of its length it would take minutes."""
    began = time.process_time()
    assert _VARYING.sub(b"#", b"abcdef" * 50_000) == b"abcdef" * 50_000
    assert time.process_time() - began < 2
