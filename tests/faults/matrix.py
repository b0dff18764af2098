"""Every kind of fault on every part, on one of two engines and on both, with the result that the client must get."""

import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from threading import Barrier
from typing import Any, Final

from dp_extproc.lab.testbed.engine import EngineProcess
from faults.fleet import BODIES, Fleet, Form, Outcome, ask, run_fleet

ANSWER: Final = "answer"
PART: Final = "part of the answer"
PART_AND_EVENT: Final = "part of the answer, and an error event"
KINDS: Final = tuple(product(BODIES, (False, True)))
"""Kinds of requests: path, and whether it streams."""
_TRIES: Final = 6
"""How often to send requests until one of them has met the fault; usually one of the first pair does."""
_STOPPED_SECONDS: Final = 45.0
"""Seconds to wait for a byte while the service is stopped. Another gateway notices that after 20 s."""
_FIRST_MEETINGS: Final = 16
"""Requests of each kind."""
_NUMBERS: Final = count()

Switch = str | dict[str, Any]
Outcomes = dict[tuple[str, bool], str]


@dataclass(frozen=True)
class Cell:
    """A fault in one part of the fleet."""

    part: str
    fault: str
    switch: Switch
    everywhere: bool
    """Whether the fault is on all engines of the role, or on one of two."""
    expected: str | dict[bool, str]
    """The result of a client that meets the fault, or those of whole responses and of streams."""

    @property
    def place(self) -> tuple[str, str, bool]:
        return self.part, self.fault, self.everywhere

    def __str__(self) -> str:
        return f"{self.part}, {self.fault}, {'all' if self.everywhere else 'one'}"

    def expects(self, form: Form = Form.MIRRORED) -> Outcomes:
        """Return the results of clients, by kind of request."""
        places = (self.part, self.fault, self.everywhere), (self.part, self.fault)
        expected = next((each[place] for place in places for each in _OTHER[form] if place in each), self.expected)
        return {(path, stream): expected if isinstance(expected, str) else expected[stream] for path, stream in KINDS}


def _cells(part: str, faults: dict[str, tuple[Switch, str | dict[bool, str], str | dict[bool, str]]]) -> list[Cell]:
    return [
        Cell(part, fault, switch, everywhere, expected)
        for fault, (switch, one, everyone) in faults.items()
        for everywhere, expected in ((False, one), (True, everyone))
    ]


_MIDDLE: Final = {"kind": "reset", "after": 1, "seconds": 0.5}
"""A reset discards what Envoy has not read, so this gives it time for the beginning of the response."""
_CLOSED: Final = {**_MIDDLE, "kind": "close"}
_SHORT: Final = {"kind": "short", "seconds": 0.1}
_STOPS: Final = {"kind": "500", "seconds": 8}
_SLOW: Final = {"kind": "slow", "seconds": 0.1}
_PREFILL_FAILED: Final = "502 prefill_failed"

CELLS: Final = [
    *_cells("prefill", {
        "refuses connections": ("refuse", ANSWER, _PREFILL_FAILED),
        "hangs": ("hang", ANSWER, "504 prefill_timeout"),
        "resets before headers": ("reset", ANSWER, _PREFILL_FAILED),
        "resets in mid-answer": (_MIDDLE, ANSWER, ANSWER),
        "answers 500": ("500", ANSWER, _PREFILL_FAILED),
        "answers 503": ("503", ANSWER, _PREFILL_FAILED),
        "stops in its 500": (_STOPS, ANSWER, _PREFILL_FAILED),
        "answers 400": ("400", "400 of the engine", "400 of the engine"),
        "is slow": (_SLOW, ANSWER, ANSWER),
        "answers no HTTP": ("noise", ANSWER, _PREFILL_FAILED),
        "answers too short": (_SHORT, ANSWER, ANSWER),
        "answers too long": ("long", ANSWER, ANSWER),
        "gives the request up": ("fail", ANSWER, _PREFILL_FAILED),
    }),
    *_cells("decode", {
        "refuses connections": ("refuse", ANSWER, "503 upstream_failed"),
        "hangs": ("hang", ANSWER, "504 prefill_timeout"),
        "resets before headers": ("reset", ANSWER, "503 upstream_failed"),
        "resets in mid-answer": (_MIDDLE, PART, PART),
        "is killed in mid-answer": (_CLOSED, {False: PART, True: PART_AND_EVENT}, {False: PART, True: PART_AND_EVENT}),
        "answers 500": ("500", ANSWER, "500 of the engine"),
        "answers 503": ("503", ANSWER, "503 of the engine"),
        "stops in its 500": (_STOPS, ANSWER, "502 decode_failed"),
        "answers 400": ("400", "400 of the engine", "400 of the engine"),
        "is slow": (_SLOW, ANSWER, ANSWER),
        "answers no HTTP": ("noise", ANSWER, "502 upstream_failed"),
        "answers too short": (_SHORT, PART, PART),
        "answers too long": ("long", ANSWER, ANSWER),
        "gives the request up": ("fail", ANSWER, {False: "500 of the engine", True: "502 decode_failed"}),
    }),
    *_cells("bootstrap port", {
        "refuses connections": ("refuse", ANSWER, "504 prefill_timeout"),
        "hangs": ("hang", ANSWER, "504 prefill_timeout"),
        "resets before headers": ("reset", ANSWER, "504 prefill_timeout"),
        "answers nonsense": ("garbage", ANSWER, "504 prefill_timeout"),
        "answers too late": ({"kind": "slow", "seconds": 60}, ANSWER, "504 prefill_timeout"),
    }),
    Cell("service", "is down", "", True, "503 service_unavailable"),
    Cell("service", "is stopped (SIGSTOP)", "", True, "503 service_unavailable"),
    Cell("service", "resets connections", "", True, "503 service_unavailable"),
    Cell("service", "answers no gRPC", "", True, "503 service_unavailable"),
    Cell("service", "is killed in mid-answer", "", True, ANSWER),
]  # fmt: skip


Place = tuple[str, str] | tuple[str, str, bool]
_OF_GATEWAY: Final[dict[Place, str | dict[bool, str]]] = {
    ("decode", "refuses connections"): "503 of the gateway",
    ("decode", "resets before headers"): "503 of the gateway",
    ("decode", "is killed in mid-answer"): PART,
    ("decode", "stops in its 500"): "500 of the engine",
    ("decode", "answers no HTTP"): "502 of the gateway",
    ("service", "is down"): "500 of the gateway",
    ("service", "resets connections"): "500 of the gateway",
    ("service", "answers no gRPC"): "500 of the gateway",
    ("service", "is killed in mid-answer"): PART,
}
_UNSEEN_EVENT: Final[dict[Place, str | dict[bool, str]]] = {
    ("decode", "gives the request up"): {False: "500 of the engine", True: "504 prefill_timeout"},
}
_REWRITTEN: Final[dict[Place, str | dict[bool, str]]] = {
    ("decode", "refuses connections"): "503 decode_failed",
    ("decode", "resets before headers"): "503 decode_failed",
    ("decode", "stops in its 500"): "502 decode_failed",
    ("decode", "answers no HTTP"): "502 decode_failed",
}
"""Errors whose text the service sees and rewrites, because responses pass through it in full duplex."""
_STOPPED: Final = ("service", "is stopped (SIGSTOP)")
_OTHER: Final[dict[Form, tuple[dict[Place, str | dict[bool, str]], ...]]] = {
    Form.MIRRORED: (),
    Form.SERVICE: (),
    Form.PICKER: (_OF_GATEWAY, _UNSEEN_EVENT, {_STOPPED: "500 of the gateway"}),
    Form.PICKER_DUPLEX: (_REWRITTEN, _OF_GATEWAY, {_STOPPED: "500 of the gateway"}),
    Form.PICKER_BUFFERED: (_OF_GATEWAY, _UNSEEN_EVENT, {_STOPPED: "504 of the gateway"}),
}
"""Results that differ from those of mirrored legs."""


def cells_of(form: Form) -> list[Cell]:
    """List the cells of a form.

    Another gateway makes one attempt, so it does not matter how many engines fail. The HTTP client of the service takes
    no byte more than a response has announced, if it comes together with the rest: that result is left to chance.
    """
    cells = [cell for cell in CELLS if cell.everywhere or not form.is_picker]
    if form is Form.MIRRORED:
        return cells
    return [cell for cell in cells if (cell.part, cell.fault) != ("prefill", "answers too long")]


IN_FULL_DUPLEX: Final = (
    ("prefill", "answers 500", False),
    ("decode", "answers 500", False),
    ("decode", "answers 500", True),
    ("decode", "answers 400", False),
    ("decode", "resets before headers", False),
    ("decode", "gives the request up", True),
)
"""The cells in which Envoy handles a request of the service differently, or ignores it, in full-duplex mode."""


_OF_BUNDLED_ENVOY: Final[dict[str, Any]] = {"retry": {"attempts": 2, "budget": 1.0}}
"""As many attempts as there are engines. Another gateway makes one."""


@contextmanager
def run_quick_fleet(form: Form = Form.MIRRORED, body_mode: str = "buffered") -> Iterator[Fleet]:
    """Run a fleet with such short timeouts that each expires quickly.

    Envoy must wait longer for a message than prefill may take, as by default.
    """
    with run_fleet(
        message_timeout=None if form.is_picker else "3s",
        form=form,
        envoy={} if form.is_picker else {"body_mode": body_mode},
        load={"interval": "100ms", "stale_after": "20s", "timeout": "5s"},
        supervision={"mode": "first_event", "prefill_timeout": "1s", "first_token_timeout": "1s"},
        # requests have to meet every fault, so no endpoint may be ejected; ejection has its own tests
        outlier_detection={"consecutive_failures": 1000},
        **({} if form.is_picker else _OF_BUNDLED_ENVOY),
    ) as fleet:
        # A decode rank that has not met a prefill engine before gives up by itself if it cannot.
        for _ in range(_FIRST_MEETINGS):
            _ask_all(fleet)
        yield fleet


def run_cell(fleet: Fleet, cell: Cell) -> Outcomes:
    """Inject a fault, send requests of every kind, and remove the fault.

    Returns:
        The result of the client that met the fault, by kind of request.
    """
    fleet.forget()
    if cell.part == "service":
        found = _SERVICE_FAULTS[cell.fault](fleet)
    else:
        with _fault(fleet, cell) as failing:
            is_noted = cell.part != "bootstrap port" and cell.switch != "refuse"
            found = _ask_until_met(fleet, failing if is_noted else [])
            fleet.settle()  # while the fault lasts, so that not the engine's recovery ends what is left
    fleet.settle()
    return found


@contextmanager
def _fault(fleet: Fleet, cell: Cell) -> Iterator[Sequence[EngineProcess]]:
    """Inject a fault, and give the engines that have it."""
    engines = fleet.decodes if cell.part == "decode" else fleet.prefills
    failing = engines if cell.everywhere else engines[:1]
    target = "bootstrap" if cell.part == "bootstrap port" else "inference"
    for engine in failing:
        engine.fault(**{target: cell.switch})
    try:
        yield failing
    finally:
        fleet.recover()


def _ask_until_met(fleet: Fleet, failing: Sequence[EngineProcess]) -> Outcomes:
    """Send requests of every kind until one of each has met the fault, or a few if engines do not record that."""
    found: dict[tuple[str, bool], set[str]] = {kind: set() for kind in KINDS}
    missing = set(KINDS)
    for tries in range(_TRIES):
        # Two at once usually go to different engines, but the ranks of one that was faster before are filled first.
        asked = [(kind, _ask(fleet, kind)) for kind in missing for _ in range(2 << tries)]
        for kind, each in asked:
            found[kind].add(str(each.result()))
        bodies = [record["body"] for engine in failing for record in engine.requests() if record["fault"]]
        missing = {kind for kind in missing if failing and not any(_tag(kind) in body for body in bodies)}
        if not missing:
            return {kind: " or ".join(sorted(outcomes - {ANSWER})) or ANSWER for kind, outcomes in found.items()}
    raise AssertionError(f"no request of {missing} has met the fault")


def _ask(fleet: Fleet, kind: tuple[str, bool], **options: Any) -> Future[Outcome]:
    """Send a request whose body no other has, as one that two engines have dropped is refused for a while."""
    path, stream = kind
    user = f"{_tag(kind)} {next(_NUMBERS)}"
    return fleet.threads.submit(ask, fleet.client, path, stream=stream, user=user, **options)


def _tag(kind: tuple[str, bool]) -> str:
    path, stream = kind
    return f"{path} {'stream' if stream else 'whole'}"


def _ask_all(fleet: Fleet, **options: Any) -> Outcomes:
    """Send one request of every kind at the same time."""
    asked = {kind: _ask(fleet, kind, **options) for kind in KINDS}
    return {kind: str(each.result()) for kind, each in asked.items()}


def _while_down(fleet: Fleet) -> Outcomes:
    fleet.service.stop(signal.SIGKILL)
    try:
        return _ask_all(fleet)
    finally:
        fleet.restart_service()


def _while_stopped(fleet: Fleet) -> Outcomes:
    fleet.service.send_signal(signal.SIGSTOP)
    try:
        return _ask_all(fleet, patience=_STOPPED_SECONDS)
    finally:
        fleet.service.send_signal(signal.SIGCONT)
        fleet.wait_until_fresh()


def _resetting(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _talking_nonsense(connection: socket.socket) -> None:
    connection.sendall(b"220 this is no gRPC\r\n")


def _while_another_listens(behave: Callable[[socket.socket], None], fleet: Fleet) -> Outcomes:
    """Let another program listen at the address of the service."""
    fleet.service.stop(signal.SIGKILL)
    grpc = fleet.service.config.listen.grpc

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as connection:
                    behave(connection)

    with socket.create_server((grpc.host, grpc.port)) as listener:
        accepting = fleet.threads.submit(accept, listener)
        try:
            found = _ask_all(fleet)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.result()
    fleet.restart_service()
    return found


def _killed_in_the_middle(fleet: Fleet) -> Outcomes:
    for engine in fleet.decodes:
        engine.fault(inference={"kind": "slow", "after": 1, "seconds": 0.5})

    def kill() -> None:
        fleet.service.stop(signal.SIGKILL)

    all_have_begun = Barrier(len(KINDS), kill)
    try:
        return _ask_all(fleet, on_first=all_have_begun.wait)
    finally:
        fleet.restart_service()
        fleet.recover()


_SERVICE_FAULTS: Final[dict[str, Callable[[Fleet], Outcomes]]] = {
    "is down": _while_down,
    "is stopped (SIGSTOP)": _while_stopped,
    "resets connections": partial(_while_another_listens, _resetting),
    "answers no gRPC": partial(_while_another_listens, _talking_nonsense),
    "is killed in mid-answer": _killed_in_the_middle,
}
