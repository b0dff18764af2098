"""Shows official clients typical mistakes and errors through Envoy, and writes what they show into docs/clients.md.

The engines are stand-ins. Each client makes each mistake with and without streaming. A cell is good if the client shows
the words of the error that say what was wrong; with ``recovers`` it has its default retries, and gets the answer.

Run: ``make clients``, or a part of it with ``make clients ARGS="--only litellm"``.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from e2e.stack import DECODE_RANKS, FAST, PATIENCE, pool_of, start_engines
from interop.clients.cases import CASES, CLIENTS, Case, Client
from interop.clients.table import Result, write_page
from patience import wait_for

HERE: Final = Path(__file__).parent
PAGE: Final = HERE.parents[1] / "docs" / "clients.md"
_TOKENS_OF_A_SECOND: Final = 130
"""Tokens of an answer that takes the place of a decode rank for a bit more than a second."""
_TOKENS_FOR_GOOD: Final = 100_000


@contextmanager
def _take_a_place(client: httpx.Client, tokens: int) -> Iterator[httpx.Response]:
    """Start a long request, as soon as the one before has left its place."""
    sampling = {"max_new_tokens": tokens, "ignore_eos": True}
    body = {"text": "hello", "stream": True, "sampling_params": sampling}

    def begin() -> tuple[httpx.Response, Iterator[bytes]] | None:
        response = client.send(client.build_request("POST", "/generate", json=body), stream=True)
        if response.status_code == httpx.codes.OK:
            pieces = response.iter_raw()  # its end would close the stream
            next(pieces)
            return response, pieces
        response.close()
        return None

    place = wait_for(begin, 30)
    assert place is not None
    try:
        yield place[0]
    finally:
        place[0].close()


class Asker:
    """A process with the clients of one language."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, case: dict[str, Any]) -> dict[str, str]:
        """Ask through a client, and return its text or its error."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the clients has ended")
        seen: dict[str, str] = json.loads(line)
        return seen


class Rig:
    """A fleet whose engines have the faults of a case while it runs."""

    def __init__(self, engines: list[EngineProcess], envoy: EnvoyProcess) -> None:
        self._engines = engines
        self.envoy = envoy

    @contextmanager
    def prepared(self, case: Case) -> Iterator[None]:
        """Let the engines have the fault of a case."""
        with ExitStack() as during:
            for engine in self._engines:
                engine.fault(inference=case.fault if case.decode_only is False or engine is self._engines[-1] else "ok")
                during.callback(engine.heal)
            if case.is_full:
                during.enter_context(self._full(ends=case.recovers))
            yield

    @contextmanager
    def _full(self, *, ends: bool) -> Iterator[None]:
        """Take every place, for good or for a bit longer than a client waits by ``retry-after``."""
        tokens = _TOKENS_OF_A_SECOND if ends else _TOKENS_FOR_GOOD
        with ExitStack() as during:
            client = during.enter_context(loopback.client(self.envoy.url, timeout=60))
            for _ in range(DECODE_RANKS):
                during.enter_context(_take_a_place(client, tokens))
            yield

    def refusals(self, status: int) -> int:
        """Count the responses of the class of a status, by Envoy's statistics."""
        name = f"http.inference.downstream_rq_{status // 100}xx"
        page = loopback.CLIENT.get(f"{self.envoy.admin_url}/stats", params={"filter": f"^{name}$"}).text
        return int(page.rpartition(": ")[2] or 0)


@contextmanager
def run_rig(*, is_full: bool) -> Iterator[Rig]:
    """Run engines, service and Envoy; with *is_full* each decode rank takes one request, at the pace of a real one."""
    pace = ("--time-scale", "1", *PATIENCE) if is_full else FAST
    with ExitStack() as running:
        flags = ("--sglang-version", "0.5.23", "--dp-attention", *pace, "--max-total-tokens", "150000")
        prefills, decodes = start_engines(running, 1, 1, *flags)
        pool = pool_of(prefills, decodes) | {"models": ["m"]}
        sections: dict[str, Any] = {"admission": {"max_requests": 1}} if is_full else {}
        config = write_config([pool], envoy={"max_body_bytes": "2MiB"}, retry={"attempts": 1}, **sections)
        service = running.enter_context(ServiceProcess(config))
        envoy = running.enter_context(EnvoyProcess(service.config))
        service.wait_until_fresh()
        service.wait_until_ready()
        yield Rig([*prefills, *decodes], envoy)


def ask(asker: Asker, rig: Rig, client: Client, case: Case, *, stream: bool) -> Result:
    """Let a client run into a case."""
    refused = case.refused_with
    with rig.prepared(case):
        before = rig.refusals(refused)
        seen = asker.ask(case.request(client, rig.envoy.url, stream=stream))
        was_refused = rig.refusals(refused) > before
    message = seen.get("message", "")
    is_good = bool(seen.get("text")) and was_refused if case.recovers else case.words(client) in message
    shown = f"{seen['error']}: {message}" if "error" in seen else seen.get("text", "")
    return Result(client, case, stream, shown, is_good)


def main() -> int:
    """Run all cases of all clients.

    Returns:
        The exit status: 1 if a client does not show an error, or does not recover.
    """
    parser = argparse.ArgumentParser(prog="interop.clients", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=Path, required=True, metavar="DIR", help="directory of the installed clients")
    parser.add_argument("--only", default="", metavar="TEXT", help="clients whose name has this text")
    parser.add_argument("--case", default="", metavar="TEXT", help="cases whose name has this text")
    args = parser.parse_args()
    askers = {
        "Python": (str(args.clients / "venv/bin/python"), str(HERE / "ask.py")),
        "Node": ("node", str(HERE / "ask.mjs"), str(args.clients)),
    }
    wanted = [client for client in CLIENTS if args.only in client.name]
    results = []
    with ExitStack() as running:
        started = {language: running.enter_context(Asker(*command)) for language, command in askers.items()}
        for is_full in (False, True):
            with run_rig(is_full=is_full) as rig:
                for client in wanted:
                    for case in CASES:
                        if case.is_full is not is_full or not case.concerns(client) or args.case not in case.name:
                            continue
                        for stream in case.streams:
                            result = ask(started[client.language], rig, client, case, stream=stream)
                            print(result.line(), flush=True)
                            results.append(result)
    if not args.only and not args.case:
        write_page(PAGE, results, args.clients)
    bad = [result for result in results if not result.is_good]
    print(f"{len(results) - len(bad)} of {len(results)} are good")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
