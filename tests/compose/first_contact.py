"""`docker compose up` works for a new user from the first line to the last, with real containers.

`make compose-test` runs this file; its name keeps it out of `make test`. The tests share the containers, in order.
"""

import json
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from openai import APIError, InternalServerError, OpenAI

from compose.checkout import ROOT, services
from compose.conftest import everything
from compose.project import Project
from patience import wait_for

RANKS: Final = 4
PREFILL: Final = ("prefill-1", "prefill-2")
DECODE: Final = ("decode-1", "decode-2")
PATIENCE: Final = 60.0
"""Seconds that a container may take to start on a busy machine."""

LONG: Final = 1000
"""Tokens of a stream that has to outlast what happens to a container meanwhile: ten seconds or more."""
ONLY_AFTER_FAILURES: Final = ('outcome!~"routed', "leg_failures", "load_failures", "> 0)")
"""Queries of the dashboard that find nothing without a failure, or without a request in flight."""


@pytest.fixture
def client(project: Project) -> Iterator[OpenAI]:
    """Give the OpenAI client, on the host, without retries that would hide a failure."""
    url = f"http://127.0.0.1:{project.ports['PORT']}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: OpenAI, text: str = "hello") -> str:
    """Request a whole response, and return its id."""
    answer = client.chat.completions.create(model="any", messages=[{"role": "user", "content": text}], max_tokens=8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content
    return answer.id


class Stream:
    """A streamed response, read by its own thread."""

    def __init__(self, client: OpenAI, max_tokens: int, text: str = "hello") -> None:
        self.id = ""
        self.pieces = 0
        self.finish: str | None = None
        self.error: Exception | None = None
        self.has_begun = threading.Event()
        self._client, self._text, self._max_tokens = client, text, max_tokens
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> "Stream":
        """Wait for the end of the stream."""
        self._thread.join(PATIENCE)
        assert not self.runs
        return self

    def _read(self) -> None:
        try:
            messages: list[Any] = [{"role": "user", "content": self._text}]
            for chunk in self._client.chat.completions.create(
                model="any", messages=messages, max_tokens=self._max_tokens, stream=True
            ):
                self.id = chunk.id or self.id
                if chunk.choices and chunk.choices[0].delta.content:
                    self.pieces += 1
                    self.has_begun.set()
                if chunk.choices and chunk.choices[0].finish_reason:
                    self.finish = chunk.choices[0].finish_reason
        except (APIError, httpx.HTTPError) as error:
            self.error = error
        finally:
            self.has_begun.set()


def begin_streams(client: OpenAI, count: int) -> list[Stream]:
    """Begin some long streams, and wait until all of them have output."""
    streams = [Stream(client, LONG) for _ in range(count)]
    for stream in streams:
        assert stream.has_begun.wait(PATIENCE)
        assert stream.error is None
    return streams


@contextmanager
def address_in_use(project: Project, address: str) -> Iterator[None]:
    """Let another container use the address of a removed one, so that its successor gets another address."""
    docker, others = project.docker, []
    image = f"{project.image}:local"
    try:
        for _ in range(10):
            sleeper = ("run", "--detach", "--network", project.network(), "--entrypoint", "sleep", image, "infinity")
            others.append(docker.run(*sleeper).strip())
            (found,) = json.loads(docker.run("inspect", others[-1]))
            if address in {each["IPAddress"] for each in found["NetworkSettings"]["Networks"].values()}:
                break
        yield
    finally:
        docker.run("rm", "--force", *others)


def is_healthy(project: Project, service: str) -> Callable[[], bool]:
    """Check whether Docker reports a container as healthy."""
    return lambda: project.inspect(service)["State"].get("Health", {}).get("Status") == "healthy"


@contextmanager
def requests_all_the_time(client: OpenAI) -> Iterator[list[Exception]]:
    """Send requests from four threads, one after the other, and give the list of their failures."""
    failures: list[Exception] = []
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            try:
                ask(client)
            except (APIError, httpx.HTTPError) as error:
                failures.append(error)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE)


def endpoints(project: Project) -> dict[str, str]:
    """Return the failure of each endpoint of the service, empty if there is none, by its URL."""
    page = httpx.get(f"http://127.0.0.1:{project.ports['ADMIN_PORT']}/loads").raise_for_status().json()
    return {each["url"]: each["failure"] or "" for each in page["endpoints"]}


def not_ready(project: Project) -> set[str]:
    """Return the URLs of the endpoints whose engine is not ready."""
    return {url for url, failure in endpoints(project).items() if failure.startswith("not_ready")}


def running_on(project: Project, engine: str) -> set[str]:
    """Return the ids of the requests that run on an engine."""
    return {
        leg["rid"] for record in project.journal(engine) if record["outcome"] == "running" for leg in record["legs"]
    }


def legs(project: Project, engines: tuple[str, ...]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Map the request id, without the letter that distinguishes the legs, to engine and leg of all finished legs."""
    return {
        leg["rid"][:-1]: (engine, leg)
        for engine in engines
        for record in project.journal(engine)
        if record["outcome"] == "finished"
        for leg in record["legs"]
    }


def test_up_prints_a_request_that_works(project: Project) -> None:
    """The last lines of ``up`` show the first steps; the request is the one of the README."""
    text = wait_for(lambda: project.docker.run("logs", project.container("try-it")), PATIENCE)
    joined = text.replace("\\\n", " ")
    (line,) = [line for line in joined.splitlines() if "/v1/chat/completions" in line]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (of_readme,) = [line for line in readme.splitlines() if line.startswith("curl ") and "/v1/chat/completions" in line]
    command, *_, url, _, header, _, body = shlex.split(line)
    assert command == "curl"
    assert [url, "-H", header, "-d", body] == shlex.split(of_readme.replace(":8080", f":{project.ports['PORT']}"))[-5:]
    name, _, value = header.partition(": ")
    answer = httpx.post(url, headers={name: value}, content=body, timeout=30)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"]
    (loads,) = re.findall(r"http://\S+/loads", joined)
    assert len(httpx.get(loads).raise_for_status().json()["endpoints"]) == 4


def test_containers_have_least_privileges(project: Project) -> None:
    """An intruder in a process finds no writable file, no capability, and no port open to the network."""
    for service in (*PREFILL, *DECODE, "dp-extproc", "envoy"):
        found = project.inspect(service)
        status = dict(line.split(":", 1) for line in project.execute(service, "cat", "/proc/self/status").splitlines())
        assert set(status["Uid"].split()) == {"101" if service == "envoy" else "65532"}
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"].strip() == "1"
        assert found["HostConfig"]["ReadonlyRootfs"]
        assert found["State"]["Health"]["Status"] == "healthy"
        for bindings in found["HostConfig"]["PortBindings"].values():
            assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}


def test_image_has_only_what_runs_and_its_labels(project: Project) -> None:
    """The image has no compiler, no wheels and no build files, and has the labels of the OCI."""
    look = "command -v cc gcc c++ ld make; ls -d /wheels /build /app/bin/pip; true"
    assert project.execute("dp-extproc", "sh", "-c", look) == ""
    assert project.execute("dp-extproc", "python", "-c", "import dns.asyncresolver") == ""
    labels = project.inspect("dp-extproc")["Config"]["Labels"]
    version = project.execute("dp-extproc", "dp-extproc", "--version").split()[1]
    assert labels["org.opencontainers.image.version"] == version
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    for command in ("demo", "load"):
        helped = project.docker.run("run", "--rm", "--network", "none", f"{project.image}:local", command, "--help")
        assert "usage" in helped


def test_image_health_checks_the_running_command(project: Project) -> None:
    """One image runs many commands; a check of the service alone would report the others as unhealthy."""
    check = ("python", "-m", "dp_extproc.runtime.container_health")
    for service in ("prefill-1", "dp-extproc"):
        assert project.execute(service, *check) == ""
    other = ("run", "--rm", "--network", "none", "--init", "--entrypoint", "sh", f"{project.image}:local", "-c")
    assert project.docker.succeeds(*other, " ".join(check))


def test_requests_reach_the_ranks_that_both_legs_name(project: Project, client: OpenAI) -> None:
    """Of many concurrent requests, streamed and not, every rank gets some, and the legs of both engines agree."""
    with ThreadPoolExecutor(32) as several:
        whole = [several.submit(ask, client, "word " * (50 * number)) for number in range(1, 33)]
        streamed = [Stream(client, 32, "word " * (50 * number)) for number in range(1, 33)]
        ids = {each.result()[:-1] for each in whole}
    for stream in streamed:
        assert (stream.end().error, stream.pieces, stream.finish) == (None, 32, "length")
    ids |= {stream.id[:-1] for stream in streamed}
    assert len(ids) == 64
    prefill, decode = legs(project, PREFILL), legs(project, DECODE)
    addresses = {server: project.address(server) for server in PREFILL}
    assert ids <= prefill.keys()
    assert ids <= decode.keys()
    for rid in ids:
        (server, first), (_, second) = prefill[rid], decode[rid]
        assert first["bootstrap_room"] == second["bootstrap_room"]
        assert first["bootstrap_room"] % RANKS == first["dp_rank"] == first["routed_dp_rank"]
        assert second["disagg_prefill_dp_rank"] == first["dp_rank"]
        assert second["routed_dp_rank"] == second["dp_rank"]
        assert second["bootstrap_host"] == addresses[server]
    for servers, found in ((PREFILL, prefill), (DECODE, decode)):
        used = {(server, leg["dp_rank"]) for rid, (server, leg) in found.items() if rid in ids}
        assert used == {(server, rank) for server in servers for rank in range(RANKS)}


def test_an_engine_is_used_again_after_it_was_killed(project: Project, client: OpenAI) -> None:
    """Its streams end immediately with an error, others continue, and it is used again, also at another address."""
    gone, address = "decode-1", project.address("decode-1")
    streams = begin_streams(client, 12)
    on_it = running_on(project, gone)
    assert all(stream.runs for stream in streams)
    project.docker.run("kill", project.container(gone))
    with address_in_use(project, address):
        for _ in range(10):
            ask(client)
        for stream in streams:
            stream.end()
        lost = [stream for stream in streams if stream.id in on_it]
        kept = [stream for stream in streams if stream.id not in on_it]
        assert lost
        assert kept
        # an error event in the stream, not an error of the connection
        assert {type(stream.error) for stream in lost} == {APIError}
        assert {(stream.error, stream.pieces, stream.finish) for stream in kept} == {(None, LONG, "length")}

        project("start", "decode")
        assert project.address(gone) != address
        wait_for(is_healthy(project, gone), PATIENCE)
        wait_for(lambda: [ask(client) for _ in range(4)] and project.journal(gone), PATIENCE)


def test_streams_continue_when_the_service_is_killed(project: Project, client: OpenAI) -> None:
    """Envoy continues the streams, rejects requests without a decision, and finds the service at its new address."""
    address = project.address("dp-extproc")
    streams = begin_streams(client, 12)
    project.docker.run("kill", project.container("dp-extproc"))
    for _ in range(5):
        with pytest.raises(InternalServerError) as refused:
            ask(client)
        assert refused.value.status_code == 503
    with address_in_use(project, address):
        for stream in streams:
            stream.end()
        assert {(stream.error, stream.pieces, stream.finish) for stream in streams} == {(None, LONG, "length")}

        project("start", "dp-extproc")
        assert project.address("dp-extproc") != address

        def answers() -> bool:
            try:
                return bool(ask(client))
            except InternalServerError as error:
                if error.status_code != 503:
                    raise
                return False

        wait_for(answers, PATIENCE)
        for _ in range(20):
            ask(client)


def test_scaled_service_gets_and_loses_traffic_without_a_failed_request(project: Project, client: OpenAI) -> None:
    """The service finds the third engine by its name. The removed one ends its streams first."""
    before = set(project.containers("decode"))
    with requests_all_the_time(client) as failures:
        project("up", "--detach", "--scale", "decode=3")
        (new,) = set(project.containers("decode")) - before
        wait_for(lambda: legs(project, (new,)), PATIENCE)
        assert len(endpoints(project)) == 5

        streams = begin_streams(client, 12)
        assert all(running_on(project, name) & {stream.id for stream in streams} for name in (*before, new))
        with ThreadPoolExecutor(1) as other:
            scaled = other.submit(project, "up", "--detach", "--scale", "decode=2")
            gone = wait_for(lambda: not_ready(project), PATIENCE)
            # Its container runs until its streams have ended, so it is still among the addresses of the name.
            assert len(gone) == 1
            for stream in streams:
                assert (stream.end().error, stream.pieces, stream.finish) == (None, LONG, "length")
            scaled.result()
        assert len(project.containers("decode")) == 2
        wait_for(lambda: len(endpoints(project)) == 4, PATIENCE)
        assert gone.isdisjoint(endpoints(project))
    assert failures == []


def test_load_profile_compares_two_placements(project: Project) -> None:
    """Both routers get the same requests, and the tables of the demo show the ranks of the same engines."""
    project("--profile", "load", "build", "load", seconds=400)  # the existing image may be of an earlier source
    printed = project("--profile", "load", "run", "--rm", "load", seconds=400, LOAD_ARGS="--requests 60")
    for word in ("the engines' own", "dp-extproc", "prefill 1", "prefill 2", "decode 1", "decode 2", "first token"):
        assert word in printed


def test_observe_profile_reads_all_that_the_dashboard_shows(project: Project, missing_images: list[str]) -> None:
    """Prometheus accepts its configuration, reaches all targets, and answers each query of the dashboard."""
    grafana = services()["grafana"]["image"]
    seen = ["prometheus"] if grafana in missing_images else ["prometheus", "grafana"]
    project("--profile", "observe", "up", "--detach", *seen)
    wait_for(is_healthy(project, "prometheus"), PATIENCE)
    project.execute("prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    api = f"http://127.0.0.1:{project.ports['PROMETHEUS_PORT']}/api/v1"
    engines = {("engines", f"{project.address(name)}:30000") for name in (*PREFILL, *DECODE)}
    expected = {("dp-extproc", "dp-extproc"), ("envoy", "envoy"), *engines}

    def targets() -> set[tuple[str, str]]:
        active = httpx.get(f"{api}/targets").raise_for_status().json()["data"]["activeTargets"]
        return {(each["labels"]["job"], each["labels"]["instance"]) for each in active if each["health"] == "up"}

    wait_for(lambda: targets() >= expected, PATIENCE)

    def answered(query: str) -> bool:
        answer = httpx.get(f"{api}/query", params={"query": query}).raise_for_status().json()
        return bool(answer["data"]["result"])

    expected_queries = [each for each in dashboard_queries() if not any(word in each for word in ONLY_AFTER_FAILURES)]
    for query in dashboard_queries():
        answered(query)  # Prometheus answers an invalid query with 400
    wait_for(lambda: all(answered(query) for query in expected_queries), PATIENCE)
    if "grafana" in seen:
        url = f"http://127.0.0.1:{project.ports['GRAFANA_PORT']}/api/dashboards/uid/dp-extproc"
        wait_for(lambda: httpx.get(url).status_code == 200, PATIENCE)


def dashboard_queries() -> list[str]:
    """Read the queries of the dashboard, with its variables filled in."""
    path = Path(ROOT, "deploy/observe/grafana/dashboards/dp-extproc.json")
    panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
    return [
        target["expr"].replace("$__rate_interval", "1m").replace("$router", "dp-extproc")
        for panel in panels
        for target in panel.get("targets", [])
    ]


def test_down_removes_everything(project: Project) -> None:
    """After ``down`` the project has no container, no network and no volume."""
    assert project.leftovers()
    project(*everything(), "down", "--volumes", "--rmi", "local")
    assert project.leftovers() == []
