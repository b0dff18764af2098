"""Requests wait by priority and in the order of arrival, each pool by itself."""

from dp_extproc.config.reliability import QueueSettings
from dp_extproc.scheduling.admission import AdmissionQueue, Ticket


class Waiting:
    """Requests that wait, by name, and those that were woken."""

    def __init__(self, max_depth: int = 10) -> None:
        self.queue = AdmissionQueue(QueueSettings(max_depth=max_depth))
        self.woken: list[str] = []

    def enqueue(self, name: str, pool: str = "m", priority: int = 0) -> Ticket:
        ticket = self.queue.enqueue(pool, priority, lambda: self.woken.append(name))
        assert ticket is not None
        return ticket


def test_queue_wakes_the_oldest_request_first() -> None:
    """The first request is woken, and its removal wakes the next one."""
    waiting = Waiting()
    first, second = waiting.enqueue("first"), waiting.enqueue("second")
    waiting.queue.notify()
    waiting.queue.remove(first)
    waiting.queue.remove(second)
    assert waiting.woken == ["first", "second"]
    assert len(waiting.queue) == 0


def test_queue_wakes_greater_priorities_first() -> None:
    """Requests of one priority are woken in the order of arrival."""
    waiting = Waiting()
    tickets = [waiting.enqueue(name, priority=priority) for name, priority in (("a", 0), ("b", 5), ("c", 5), ("d", -1))]
    order = [tickets[1], tickets[2], tickets[0], tickets[3]]
    waiting.queue.notify()
    for ticket in order:
        waiting.queue.remove(ticket)
    assert waiting.woken == ["b", "c", "a", "d"]


def test_queue_wakes_the_first_request_of_each_pool() -> None:
    """A full pool holds up no request of another one."""
    waiting = Waiting()
    waiting.enqueue("a", "one")
    waiting.enqueue("b", "two")
    waiting.queue.notify()
    assert waiting.woken == ["a", "b"]
    assert not waiting.queue.must_wait("three", 0, None)


def test_removal_from_the_middle_wakes_no_request() -> None:
    """Nothing has changed for the requests before."""
    waiting = Waiting()
    waiting.enqueue("first")
    middle = waiting.enqueue("middle")
    waiting.queue.remove(middle)
    assert waiting.woken == []


def test_request_must_wait_behind_its_own_priority() -> None:
    """A new request waits behind those of its priority, and only the first one in the queue may try."""
    waiting = Waiting()
    first, second = waiting.enqueue("first", priority=1), waiting.enqueue("second", priority=1)
    assert waiting.queue.must_wait("m", 1, None)
    assert waiting.queue.must_wait("m", 0, None)
    assert not waiting.queue.must_wait("m", 2, None)
    assert not waiting.queue.must_wait("m", 1, first)
    assert waiting.queue.must_wait("m", 1, second)


def test_full_queue_takes_no_request() -> None:
    """A request that finds the queue full is refused at once."""
    waiting = Waiting(max_depth=1)
    waiting.enqueue("a")
    assert waiting.queue.enqueue("m", 9, lambda: None) is None
