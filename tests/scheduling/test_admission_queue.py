"""Who waits, and who is first."""

from dp_extproc.config.reliability import QueueSettings
from dp_extproc.scheduling.admission import AdmissionQueue, Ticket


class People:
    """Those who wait, by name, and who was called."""

    def __init__(self, max_depth: int = 10) -> None:
        self.queue = AdmissionQueue(QueueSettings(max_depth=max_depth))
        self.called: list[str] = []

    def join(self, name: str, pool: str = "m", priority: int = 0) -> Ticket:
        ticket = self.queue.enqueue(pool, priority, lambda: self.called.append(name))
        assert ticket is not None
        return ticket


def test_first_in_first_out() -> None:
    """Who came first is called, and who leaves makes the next one first."""
    people = People()
    first, second = people.join("first"), people.join("second")
    people.queue.notify()
    people.queue.remove(first)
    people.queue.remove(second)
    assert people.called == ["first", "second"]
    assert len(people.queue) == 0


def test_greater_priorities_go_first() -> None:
    """Among equals the order of arrival holds."""
    people = People()
    tickets = [people.join(name, priority=priority) for name, priority in (("a", 0), ("b", 5), ("c", 5), ("d", -1))]
    order = [tickets[1], tickets[2], tickets[0], tickets[3]]
    people.queue.notify()
    for ticket in order:
        people.queue.remove(ticket)
    assert people.called == ["b", "c", "a", "d"]


def test_pools_wait_for_themselves() -> None:
    """A full model keeps nobody from another one."""
    people = People()
    people.join("a", "one")
    people.join("b", "two")
    people.queue.notify()
    assert people.called == ["a", "b"]
    assert not people.queue.must_wait("three", 0, None)


def test_who_gives_up_in_the_middle_calls_nobody() -> None:
    """Nothing has changed for those before."""
    people = People()
    people.join("first")
    middle = people.join("middle")
    people.queue.remove(middle)
    assert people.called == []


def test_nobody_overtakes() -> None:
    """A new request waits behind those of its priority, and only the first one in the queue may try."""
    people = People()
    first, second = people.join("first", priority=1), people.join("second", priority=1)
    assert people.queue.must_wait("m", 1, None)
    assert people.queue.must_wait("m", 0, None)
    assert not people.queue.must_wait("m", 2, None)
    assert not people.queue.must_wait("m", 1, first)
    assert people.queue.must_wait("m", 1, second)


def test_the_line_is_bounded() -> None:
    """Who finds it full is refused at once."""
    people = People(max_depth=1)
    people.join("a")
    assert people.queue.enqueue("m", 9, lambda: None) is None
