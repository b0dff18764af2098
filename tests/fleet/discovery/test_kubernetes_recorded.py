"""Plays back what kube-apiserver 1.36.3 has sent; ``make kubernetes-run`` recorded it."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from dp_extproc.config.discovery import KubernetesSettings
from dp_extproc.fleet.discovery.kubernetes.reflector import Timing
from dp_extproc.fleet.discovery.kubernetes.source import KubernetesSource
from dp_extproc.lab.testbed.ports import free_port
from patience import wait_for
from source_reports import Reports, reports_of

RECORDED = Path(__file__).parent / "recorded"
TIMING = Timing(first_pause=0.02, longest_pause=0.1, steady=0.0)


@dataclass(frozen=True)
class Exchange:
    """A request with its answer: the page of a list, or one line of a watch."""

    parameters: dict[str, str]
    answer: Any


def exchanges(name: str) -> list[Exchange]:
    """Read a recording. A request without an answer is left out: the API server was away.

    Each line of a watch becomes a watch of its own that goes on from the version of the line before it. So a test sees
    what the source reports after each line.
    """
    found: list[Exchange] = []
    parameters: dict[str, str] = {}
    for text in (RECORDED / name).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if answer := line.get("page") or line.get("event"):
            found.append(Exchange(parameters, answer))
            version = line.get("event", {}).get("object", {}).get("metadata", {}).get("resourceVersion")
            parameters = parameters | ({"resourceVersion": version} if version else {})
        else:
            parameters = line.get("list") or line.get("watch") or parameters
    return found


@contextmanager
def playback(script: list[Exchange]) -> Iterator[tuple[str, list[str]]]:
    """Answer the recorded requests in their order; yield the URL, and requests that differ from the recorded ones."""
    port, rest = free_port(), iter(script)
    differing: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                asked = dict(parse_qsl(urlsplit(head.split(" ")[1]).query, keep_blank_values=True))
                exchange = next(rest, None)
                if exchange is None:
                    await asyncio.sleep(3600)
                    continue
                wanted = exchange.parameters
                if any(asked.get(key) != wanted[key] for key in wanted if key != "timeoutSeconds"):
                    differing.append(f"{asked} is not {wanted}")
                body = json.dumps(exchange.answer) + "\n"
                writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the source, or the test, has ended
        finally:
            writer.transport.abort()

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        async with await asyncio.start_server(serve, "127.0.0.1", port):
            listening.set()
            await over.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    listening, over = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=lambda: asyncio.run(run()), name="playback")
    thread.start()
    try:
        assert listening.wait(10)
        yield f"http://127.0.0.1:{port}", differing
    finally:
        loops[0].call_soon_threadsafe(over.set)
        thread.join()


def watch(name: str, tmp_path: Path, service: str, until: list[str]) -> tuple[Reports, list[str]]:
    """Let a source read a recording, until its members have these addresses and states."""
    with playback(exchanges(name)) as (url, differing):
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(
            "{current-context: x, contexts: [{name: x, context: {cluster: c, namespace: llm}}], "
            f"clusters: [{{name: c, cluster: {{server: '{url}'}}}}]}}",
            encoding="utf-8",
        )
        settings = KubernetesSettings(service=service)
        source = KubernetesSource(settings, environment={"KUBECONFIG": str(kubeconfig)}, timing=TIMING)
        with reports_of(source) as reports:
            # A recording may begin with the state in which it ends.
            wait_for(lambda: len(found := states(reports)) > 1 and found[-1] == until)
        return reports, differing


def states(reports: Reports) -> list[list[str]]:
    """List the different snapshots, each as the sorted addresses with their states."""
    found = [sorted(f"{each.host} {each.state.value}" for each in snapshot) for snapshot in reports.snapshots]
    return [each for index, each in enumerate(found) if index == 0 or each != found[index - 1]]


def test_pods_of_a_service_go_from_not_ready_to_gone(tmp_path: Path) -> None:
    """The controller of Kubernetes wrote these slices: a pod starts, is ready, terminates, and is removed."""
    reports, differing = watch("service.jsonl", tmp_path, "decode", [])
    one, two, other = "10.77.1.1", "10.77.1.2", "10.77.1.9"
    assert states(reports)[-7:] == [
        [f"{one} ready", f"{two} ready"],
        [f"{one} terminating", f"{two} ready"],
        [f"{two} ready"],
        [f"{two} ready", f"{other} ready"],
        [f"{two} ready"],
        [f"{two} terminating"],
        [],
    ]
    assert {each.group for snapshot in reports.snapshots for each in snapshot} == {"r1", None}
    assert {each.name for snapshot in reports.snapshots for each in snapshot} == {"decode-1", "decode-2", ""}
    assert (differing, reports.failures) == ([], [])


def test_an_expired_version_leads_to_a_list_without_what_was_deleted(tmp_path: Path) -> None:
    """The API server was away for a minute, its history was compacted, and a slice was deleted meanwhile."""
    kept = ["10.77.2.2 ready"]
    reports, differing = watch("outage.jsonl", tmp_path, "away", [*kept, "10.77.2.3 ready"])
    assert states(reports) == [["10.77.2.1 ready", *kept], kept, [*kept, "10.77.2.3 ready"]]
    assert (differing, reports.failures) == ([], [])
