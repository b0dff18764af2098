"""Test what the ids of a client stand for."""

import time

from dp_extproc.request.client_ids import ClientIds


def test_each_id_stands_for_its_prompts_and_the_single_one_for_all() -> None:
    """A client may give the same id to several prompts."""
    assert ClientIds(("a", "b", "a")).prompts() == {"a": (0, 2), "b": (1,)}
    assert ClientIds(("a_0", "a_1"), "a").prompts() == {"a_0": (0,), "a_1": (1,), "a": (0, 1)}


def test_equal_ids_take_time_in_proportion_to_their_number() -> None:
    """Each is looked at once: in proportion to the square of their number they would take minutes."""
    began = time.process_time()
    assert len(ClientIds(("same",) * 200_000).prompts()["same"]) == 200_000
    assert time.process_time() - began < 2
