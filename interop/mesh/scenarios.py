"""The scenarios of the end-to-end tests through another control plane's gateway. Each adds lines to the report."""

import hashlib
import json
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import httpx

from dp_extproc import contract
from dp_extproc.envoy_config.names import Names
from dp_extproc.lab.testbed.engine import EngineProcess
from faults.decoy import Decoy
from faults.fleet import BODIES, Outcome, ask
from faults.test_other_front_doors import forged_headers
from interop.mesh.site import RANKS, Fleet, Site, running_on
from patience import wait_for

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
_OURS: Final = ("x-dp-", "x-override-", "x-data-parallel-rank", "x-envoy-")
"""Beginnings of the headers that no engine may get from a client."""
_SLOW: Final = {"kind": "slow", "after": 1, "seconds": 1.5}
"""The engine sends the first piece of its response, and the rest after a pause."""
_PART_AND_EVENT: Final = "part of the answer, and an error event"
_RETRIES: Final = r"upstream_rq_retry$"
_ABANDONED: Final = r"(retry_or_shadow_abandoned|upstream_rq_retry_overflow)$"
_MANY: Final = 48

Scenario = Callable[[Site], None]


def both_legs(site: Site) -> None:
    """Both legs have the same room, and the ranks in their bodies are those on which the engines run them."""
    pairs = set()
    for _ in range(16):
        sent = {**BODIES[CHAT], "user": "both legs"}
        answer = site.client.post(CHAT, json=sent)
        assert answer.status_code == 200, answer.text
        prefill, decode = _legs(site.fleet)
        on_prefill, on_decode = json.loads(prefill["body"]), json.loads(decode["body"])
        room = on_decode["bootstrap_room"]
        assert on_prefill["bootstrap_room"] == room
        assert room % RANKS == prefill["rank"] == on_prefill["routed_dp_rank"] == on_decode["disagg_prefill_dp_rank"]
        assert on_decode["routed_dp_rank"] == decode["rank"]
        assert on_prefill["rid"] != on_decode["rid"]
        assert _ours(site, prefill) == _ours(site, decode) == _leaked(answer) == []
        pairs.add((prefill["rank"], decode["rank"]))
    seen = f"one room on both legs, ranks as in the bodies; pairs of ranks used: {sorted(pairs)}"
    site.report.add("16 chats, one by one", seen, good=len(pairs) > 1)


def responses_of_each_form(site: Site) -> None:
    """Whole responses, streams and batches are complete."""
    for path in BODIES:
        for stream in (False, True):
            outcome = ask(site.client, path, stream=stream)
            site.report.add(f"{path}, {'stream' if stream else 'whole'}", str(outcome), good=outcome.complete)
    site.fleet.forget()
    answer = site.client.post(COMPLETIONS, json={"model": "any", "prompt": ["a", "bb", "ccc"], "max_tokens": 3})
    rooms = [json.loads(leg["body"])["bootstrap_room"] for leg in _legs(site.fleet)]
    good = answer.status_code == 200 and rooms[0] == rooms[1] and len(set(rooms[0])) == 3
    site.report.add("batch of 3 prompts", f"{answer.status_code}, rooms on both legs: {len(set(rooms[0]))}", good=good)
    listed = site.client.get("/v1/models")
    site.report.add("GET /v1/models", str(listed.status_code), good=listed.status_code == 200)


def stream_arrives_in_pieces(site: Site) -> None:
    """The first event arrives while the engine still computes."""
    with faulty(site.fleet.decodes, _SLOW):
        began, arrivals = time.monotonic(), []
        outcome = ask(site.client, CHAT, stream=True, on_first=lambda: arrivals.append(time.monotonic() - began))
        took = time.monotonic() - began
    seen = f"first event after {arrivals[0]:.2f} s of {took:.2f} s; {outcome}"
    site.report.add("stream of a slow engine", seen, good=outcome.complete and arrivals[0] < took / 2)


def many_at_once(site: Site) -> None:
    """Concurrent requests get all their responses."""
    asked = [site.threads.submit(ask, site.client, CHAT, stream=bool(each % 2)) for each in range(_MANY)]
    answered = sum(each.result().complete for each in asked)
    site.report.add(f"{_MANY} chats at once, half of them streams", f"{answered} answers", good=answered == _MANY)


def retries(site: Site) -> None:
    """Requests of every size are repeated if the decode engine answers 503, and clients get no trace of it."""
    failing = site.fleet.decodes[0]
    for text, size in (("small", 10), ("100 kB", 100_000), ("2 MiB", 2 << 20), ("32 MiB", 32 << 20)):
        site.fleet.forget()
        before, left = site.count(_RETRIES), _abandoned(site)
        count = 2 if size > 10 << 20 else 6
        answers: list[httpx.Response] = []
        with faulty([failing], "503"):
            while not failing.requests() and len(answers) < 10 * count:
                answers += [_complete(site, _body(size)) for _ in range(count)]
        met = len(failing.requests())
        good = {each.status_code for each in answers} == {200} and met > 0 and _abandoned(site) == left
        good = good and site.count(_RETRIES) - before >= met and not any(map(_leaked, answers))
        statuses = sorted({each.status_code for each in answers})
        seen = f"{len(answers)} requests: {statuses}; {met} met the 503 and were repeated"
        site.report.add(f"one decode engine answers 503, {text}", seen, good=good)


def all_engines_fail(site: Site) -> None:
    """The client gets the engine's own error after the last attempt, without retry headers."""
    with faulty(site.fleet.decodes, "503"):
        answer = site.client.post(CHAT, json=BODIES[CHAT])
    seen = f"{answer.status_code}, headers of this project: {_leaked(answer)}"
    site.report.add("both decode engines answer 503", seen, good=answer.status_code == 503 and not _leaked(answer))


def large_body(site: Site) -> None:
    """A body of 32 MiB arrives unchanged on both legs."""
    site.fleet.forget()
    body = _body(32 << 20)
    answer = _complete(site, body)
    legs = _legs(site.fleet)
    same = [leg["body_sha256"] == hashlib.sha256(_front(leg, len(body) - 1) + body[1:]).hexdigest() for leg in legs]
    good = answer.status_code == 200 and all(same)
    site.report.add("body of 32 MiB", f"{answer.status_code}, unchanged on both legs: {all(same)}", good=good)
    refused = _complete(site, _body(site.fleet.config.envoy.max_body_bytes + 1))
    site.report.add("body above the limit", f"{refused.status_code}", good=refused.status_code == 413)


def killed_prefill(site: Site) -> None:
    """A prefill engine that is killed with a leg costs its clients nothing but a second attempt."""
    met, outcomes = kill_with_a_leg(site, site.fleet.prefills[0])
    _add_kill(site, "prefill engine killed with a leg that it had not answered", met, outcomes)


def killed_decode(site: Site) -> None:
    """A decode engine that is killed before its first byte costs its clients nothing but a second attempt."""
    met, outcomes = kill_with_a_leg(site, site.fleet.decodes[0])
    _add_kill(site, "decode engine killed before its first byte", met, outcomes)


def kill_with_a_leg(site: Site, engine: EngineProcess) -> tuple[int, list[Outcome]]:
    """Kill an engine with legs that it has not answered.

    Returns:
        How many legs it had, and the outcomes of all requests.
    """
    site.fleet.forget()
    asked: list[Future[Outcome]] = []
    engine.fault(inference="hang")
    while not running_on(engine) and not _hanging(engine) and len(asked) < 4 * _MANY:
        asked += [site.threads.submit(ask, site.client, CHAT, stream=bool(each % 2)) for each in range(4)]
        time.sleep(0.2)
    met = len(engine.requests())
    engine.stop(signal.SIGKILL)
    outcomes = [each.result() for each in asked]
    site.fleet.recover()
    return met, outcomes


def _add_kill(site: Site, case: str, met: int, outcomes: Sequence[Outcome]) -> None:
    answered = sum(each.complete for each in outcomes)
    seen = f"{len(outcomes)} requests, {met} at the killed engine: {answered} answers"
    site.report.add(case, seen, good=answered == len(outcomes) and met > 0)


def killed_in_mid_stream(site: Site, of_decode: str = _PART_AND_EVENT) -> None:
    """A stream whose decode engine is killed ends with an error event; one whose prefill engine is killed goes on.

    *of_decode* is the outcome with a gateway that adds no event.
    """
    for role, engines, expected in (
        ("decode", site.fleet.decodes, of_decode),
        ("prefill", site.fleet.prefills, "answer"),
    ):
        site.fleet.forget()
        with faulty(site.fleet.decodes, _SLOW):

            def kill(engines: Sequence[EngineProcess] = engines) -> None:
                time.sleep(0.3)  # Envoy reads the first bytes; a reset would discard them
                next(engine for engine in engines if engine.requests()).stop(signal.SIGKILL)

            outcome = ask(site.client, CHAT, stream=True, on_first=kill)
            site.fleet.recover()
        site.report.add(f"{role} engine killed in mid-stream", str(outcome), good=str(outcome) == expected)


def client_aborts(site: Site) -> None:
    """A client that disconnects ends both legs, and no reservation is left."""
    site.fleet.forget()
    with faulty(site.fleet.decodes, {**_SLOW, "seconds": 9}):  # the abort has to arrive first
        body = {**BODIES[CHAT], "stream": True, "max_tokens": 500}
        with site.client.stream("POST", CHAT, json=body) as answer:
            next(answer.iter_bytes())
        _, decode = _legs(site.fleet)
    site.fleet.settle()
    seen = f"decode: {decode['outcome']}, no reservation left"
    site.report.add("client disconnects in mid-stream", seen, good=decode["outcome"] == "aborted")
    site.fleet.forget()
    with faulty(site.fleet.prefills, "hang"):
        connection = _send(site, CHAT, {**BODIES[CHAT], "stream": False})
        wait_for(lambda: [each for engine in site.fleet.prefills for each in engine.requests()])
        connection.close()
        site.fleet.settle()
    ended = [leg["outcome"] for engine in site.fleet.engines for leg in engine.requests()]
    seen = f"legs: {', '.join(ended)}; no reservation left"
    site.report.add("client disconnects before the response", seen, good=set(ended) == {"aborted"} and len(ended) == 2)


def hostile_headers(site: Site) -> None:
    """A client controls no routing by headers, and none of them reaches an engine."""
    decoy = Decoy()
    site.fleet.forget()
    victims = [engine.url.removeprefix("http://") for engine in site.fleet.engines]
    answers = []
    for victim in victims:
        headers = forged_headers(victim, decoy.address)
        answers += [site.client.post(CHAT, json=BODIES[CHAT], headers=headers).status_code for _ in range(4)]
    for name, value in forged_headers(victims[0], decoy.address).items():
        answers.append(site.client.post(CHAT, json=BODIES[CHAT], headers={name: value}).status_code)
    lookup = site.client.get("/v1/models", headers=forged_headers(victims[0], decoy.address)).status_code
    site.fleet.settle()
    reached = {name for engine in site.fleet.engines for leg in engine.requests() for name in _ours(site, leg)}
    ejected = [each["url"] for each in site.fleet.endpoints() if each["failure"]]
    good = set(answers) == {200} and lookup == 200 and not decoy.visits and not reached and not ejected
    decoy.close()
    seen = (
        f"{len(answers)} requests: {sorted(set(answers))}; at engines: {sorted(reached)}; at the decoy: {decoy.visits}"
    )
    site.report.add("forged x-dp-*, x-override-*, x-envoy-*, x-data-parallel-rank", seen, good=good)


def neighbour_is_untouched(site: Site) -> None:
    """The other host on the gateway gets its headers as before, and its response headers reach its clients."""
    headers = {
        "x-dp-decode-host": "192.0.2.1:9",
        "x-dp-of-theirs": "1",
        "x-override-rid": "theirs",
        "x-data-parallel-rank": "3",
    }
    answer = site.neighbour.post("/anything", content=b"x" * 1000, headers=headers)
    arrived = {name: value for name, value in answer.json().items() if name in headers}
    good = answer.status_code == 200 and arrived == headers and answer.headers.get("x-dp-retry") == "of the neighbour"
    seen = f"{answer.status_code}, {len(arrived)} of {len(headers)} headers arrived, its x-dp-retry came through"
    site.report.add("another host on the gateway", seen if good else f"{seen}: {arrived}", good=good)


def start_service_again(site: Site) -> None:
    """Start the service, and wait until our host answers."""
    site.fleet.service.start()
    site.fleet.service.wait_until_listening()
    site.fleet.service.wait_until_ready()
    site.fleet.recover()
    wait_for(lambda: ask(site.client, CHAT, stream=False).complete)


def service_is_down(site: Site) -> None:
    """Without the service our host fails closed, and the neighbour is served."""
    site.fleet.forget()
    site.fleet.service.stop(signal.SIGKILL)
    refused = ask(site.client, CHAT, stream=False)
    other = site.neighbour.get("/").status_code
    start_service_again(site)
    good = str(refused) == "503 service_unavailable" and other == 200
    site.report.add("service killed, then started", f"{refused}; neighbour {other}; then an answer", good=good)


def old_client(site: Site) -> None:
    """A client that speaks HTTP/1.0 gets a response, or the refusal of the gateway."""
    port = httpx.URL(site.gateway.url).port
    assert port is not None
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        body = json.dumps(BODIES[CHAT]).encode()
        head = f"POST {CHAT} HTTP/1.0\r\nhost: {site.client.headers['host']}\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status = connection.recv(4096).decode(errors="replace").partition("\r\n")[0]
    site.report.add("HTTP/1.0", status, good=any(code in status for code in (" 200 ", " 426 ")))


SCENARIOS: Final[Sequence[Scenario]] = (
    both_legs,
    responses_of_each_form,
    stream_arrives_in_pieces,
    many_at_once,
    retries,
    all_engines_fail,
    large_body,
    killed_prefill,
    killed_decode,
    killed_in_mid_stream,
    client_aborts,
    hostile_headers,
    neighbour_is_untouched,
    service_is_down,
    old_client,
)


def run_scenarios(site: Site, scenarios: Sequence[Scenario] = SCENARIOS, only: Sequence[str] = ()) -> None:
    """Run scenarios one after the other. One that fails leaves a line, and the others run all the same."""
    for scenario in scenarios:
        name = getattr(scenario, "__name__", str(scenario))
        if only and name not in only:
            continue
        try:
            site.fleet.forget()
            scenario(site)
            site.fleet.settle()
        except Exception as error:  # noqa: BLE001 - a transcript has a line for each failure
            traceback.print_exc()
            site.report.add(name, f"{type(error).__name__}: {error}"[:300], good=False)
            site.fleet.recover()


def _ours(site: Site, leg: dict[str, Any]) -> list[str]:
    return [name for name in leg["headers"] if name.startswith(_OURS) and name not in site.gateway_headers]


def _abandoned(site: Site) -> int:
    """Count requests that were not repeated, because the gateway did not have their bodies any more.

    Envoy also counts that its own calls of the service are not repeated once a body is sent, which does not matter.
    """
    return site.count(_ABANDONED) - site.count(rf"^cluster\.{Names.of(site.fleet.config).service}\..*{_ABANDONED}")


def _leaked(answer: httpx.Response) -> list[str]:
    """List the headers of this project that a client got. Those of Envoy are the gateway's own matter."""
    return [
        name for name in answer.headers if name.startswith(contract.OWNED_PREFIX) and name != contract.REASON_HEADER
    ]


def _legs(fleet: Fleet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Wait until the one request since the journals were cleared has ended on both legs, and clear them again."""

    def ended(engines: Sequence[EngineProcess]) -> list[dict[str, Any]]:
        return [leg for engine in engines for leg in engine.requests() if leg["outcome"] != "running"]

    (prefill,), (decode,) = (wait_for(partial(ended, engines)) for engines in (fleet.prefills, fleet.decodes))
    fleet.forget()
    return prefill, decode


@contextmanager
def faulty(engines: Sequence[EngineProcess], fault: str | dict[str, Any]) -> Iterator[None]:
    """Inject a fault into engines for a while."""
    for engine in engines:
        engine.fault(inference=fault)
    try:
        yield
    finally:
        for engine in engines:
            if engine.is_running:
                engine.heal()


def _hanging(engine: EngineProcess) -> list[dict[str, Any]]:
    return [leg for leg in engine.requests() if leg["fault"]]


def _body(size: int) -> bytes:
    """Write a completion with so many bytes that are no prompt: an engine rejects eight million tokens."""
    return b'{"model":"any","max_tokens":1,"prompt":"p","padding":"' + b"0123456789abcdef" * (size // 16) + b'"}'


def _complete(site: Site, body: bytes) -> httpx.Response:
    return site.client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})


def _front(leg: dict[str, Any], kept: int) -> bytes:
    """Return what was written in front of the client's fields."""
    text: str = leg["body"] or leg["body_head"]
    return text[: leg["body_length"] - kept].encode()


def _send(site: Site, path: str, content: Any) -> socket.socket:
    """Send a request whose response is not read."""
    url, body = httpx.URL(site.gateway.url), json.dumps(content).encode()
    connection = socket.create_connection((url.host, url.port or 80), 30)
    head = f"POST {path} HTTP/1.1\r\nhost: {site.client.headers['host']}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection
