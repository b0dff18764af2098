"""Engines that speak TLS and require client certificates: the service reads them, and Envoy sends them both legs."""

import asyncio
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from certificates import Authority
from dp_extproc.config import EngineTls
from dp_extproc.config.load import LoadSettings
from dp_extproc.engines.listener import FailureKind
from dp_extproc.engines.model import Endpoint, Role
from dp_extproc.fleet.check import EngineReport, check_engines
from dp_extproc.lab.testbed import loopback
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.runtime.engine_tls import engine_context
from e2e.stack import Stack, run_stack
from patience import wait_for

ID = "spiffe://cluster.test/ns/llm/sa/engine"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}


@dataclass(frozen=True)
class Fleet:
    """A fleet with TLS, and the files of its clients."""

    stack: Stack
    authority: Authority
    client: Path
    """Directory of the files of the service and Envoy: ``ca.pem``, ``client.pem`` and ``client.key``."""
    prober: ssl.SSLContext

    @property
    def settings(self) -> dict[str, Any]:
        return settings_in(self.client)


def settings_in(directory: Path) -> dict[str, Any]:
    files = {"ca": "ca.pem", "cert": "client.pem", "key": "client.key"}
    return {"names": ["engine.test", ID], **{key: str(directory / name) for key, name in files.items()}}


def trust(directory: Path, authority: Authority) -> None:
    """Replace the CA bundle of the clients and their certificate, as Kubernetes does: by moves."""
    authority.issue("client", "client.test", into=directory)
    shutil.copy(authority.ca, directory / "new")
    (directory / "new").replace(directory / "ca.pem")


def options_of(authority: Authority) -> list[str]:
    own = authority.issue("engine", ID)
    return ["--tls-cert", own["cert"], "--tls-key", own["key"], "--tls-client-ca", authority.ca]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    root = tmp_path_factory.mktemp("tls")
    authority, client, secrets = Authority.found(root / "authority"), root / "client", root / "secrets"
    for each in (client, secrets):
        each.mkdir()
    trust(client, authority)
    prober = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    prober.check_hostname = False
    prober.load_verify_locations(authority.ca)
    prober.load_cert_chain(client / "client.pem", client / "client.key")
    with run_stack(
        decodes=2,
        options=options_of(authority),
        tls=prober,
        engine_tls=settings_in(client),
        envoy={"secrets": str(secrets)},
    ) as stack:
        yield Fleet(stack, authority, client, prober)


def test_both_legs_and_all_pages_use_tls(fleet: Fleet) -> None:
    """Plain answers and streams arrive as without TLS, and neither leg passes in clear."""
    stack = fleet.stack
    stack.forget()
    answer = stack.client.post("/v1/chat/completions", json=CHAT)
    with stack.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
        events = [line for line in stream.iter_lines() if line]

    assert answer.json()["choices"][0]["message"]["content"]
    assert events[-1] == "data: [DONE]"
    assert len(wait_for(lambda: received if len(received := stack.received()) == 4 else [])) == 4
    stats = loopback.CLIENT.get(f"{stack.envoy.admin_url}/stats?filter=ssl.handshake").text
    counts = dict(line.split(": ") for line in stats.splitlines())
    assert {name for name, count in counts.items() if int(count)} == {
        "cluster.prefill.ssl.handshake",
        "cluster.decode_server.ssl.handshake",
    }
    endpoints = stack.service.loads()["endpoints"]
    assert [each["url"][:8] for each in endpoints] == ["https://"] * 3
    assert "dp_extproc_missing_prefill_legs_total 0.0" in stack.service.metrics()


def test_a_request_is_retried_when_its_decode_engine_is_killed(fleet: Fleet) -> None:
    """The other decode engine gets the attempt, by TLS too."""
    stack, victim = fleet.stack, fleet.stack.decodes[0]
    victim.stop(signal.SIGKILL)
    try:
        answers = [stack.client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(6)]
    finally:
        victim.start()
        victim.wait_until_listening()
        stack.service.wait_until_fresh()

    assert answers == [200] * 6


def report_on(url: str, settings: EngineTls | None) -> EngineReport:
    endpoint = Endpoint(url, "127.0.0.1", int(url.rpartition(":")[2]), "*", Role.DECODE)
    load = LoadSettings.model_validate({"timeout": "2s"})
    (report,) = asyncio.run(check_engines([endpoint], load, tls=engine_context(settings)))
    return report


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("all right", None, ""),
        ("another authority", FailureKind.TLS, "; compare engine_tls.ca and engine_tls.names with its certificate"),
        ("another name", FailureKind.TLS, f"TLS failed: the certificate is for {ID}, and not for other.test; compare"),
        ("no TLS there", FailureKind.TLS, "it seems not to speak TLS"),
        ("no client certificate", FailureKind.UNREADABLE, "an engine that requires another client certificate"),
        ("no TLS here", FailureKind.UNREADABLE, "an engine that expects TLS does so, too"),
    ],
)
def test_a_check_names_what_is_wrong_about_tls(
    fleet: Fleet, tmp_path: Path, case: str, kind: FailureKind | None, message: str
) -> None:
    """Whoever reads it finds the file or the name to compare."""
    engine, given = fleet.stack.decodes[1], fleet.settings
    url = engine.url
    if case == "another authority":
        given["ca"] = Authority.found(tmp_path).ca
    elif case == "another name":
        given["names"] = ["other.test"]
    elif case == "no TLS there":
        url = engine.debug_url.removesuffix("/debug").replace("http:", "https:")
    elif case == "no client certificate":
        del given["cert"], given["key"]
    elif case == "no TLS here":
        url = url.replace("https:", "http:")
    failure = report_on(url, EngineTls.model_validate(given)).failure

    assert (failure and failure.kind) == kind
    assert message in (failure.message if failure else "")


def test_the_command_check_prints_the_failure(fleet: Fleet, tmp_path: Path) -> None:
    """The table has the kind, and a line below it the reason."""
    engine = fleet.stack.prefills[0]
    content = {
        "engine_tls": {**fleet.settings, "ca": Authority.found(tmp_path).ca},
        "pools": [{"models": ["*"], "workers": {"endpoints": [engine.url]}}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    argv = [sys.executable, "-m", "dp_extproc", "check", "-c", str(tmp_path / "config.yaml")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 1
    row = next(line for line in done.stdout.splitlines() if line.startswith(f"{engine.url} "))
    assert row.split()[-1] == "tls"
    assert re.search(f"^{engine.url}: TLS failed: .*; compare engine_tls.ca", done.stdout, re.MULTILINE)


def test_new_certificates_are_used_without_a_restart(fleet: Fleet, tmp_path: Path) -> None:
    """Every engine gets another authority, and then its clients do: the service, and Envoy on both legs.

    In between the failure is shown everywhere, and a missing file changes nothing.
    """
    stack, other = fleet.stack, Authority.found(tmp_path)
    (fleet.client / "ca.pem").rename(fleet.client / "gone")
    wait_for(lambda: "ca.pem cannot be read: No such file" in stack.service.log())
    assert "the certificates that were there before stay in use" in stack.service.log()
    assert stack.client.post("/v1/chat/completions", json=CHAT).status_code == 200
    (fleet.client / "gone").rename(fleet.client / "ca.pem")

    own = other.issue("client", "client.test")
    fleet.prober.load_verify_locations(other.ca)
    fleet.prober.load_cert_chain(own["cert"], own["key"])
    new = options_of(other)
    engines = (*stack.prefills, *stack.decodes)
    for engine in engines:
        engine.stop(signal.SIGKILL)
        engine.change(*new)
        engine.start()
    for engine in engines:
        engine.wait_until_listening()
    wait_for(lambda: failures(stack) == ["tls"] * 3)
    assert 'kind="tls"' in stack.service.metrics()
    assert re.search(r"WARNING.*: TLS failed: .*; compare engine_tls.ca", stack.service.log())

    trust(fleet.client, other)
    stack.service.wait_until_fresh()
    wait_for(lambda: stack.client.post("/v1/chat/completions", json=CHAT).status_code == 200)
    answers = [stack.client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(4)]
    assert answers == [200] * 4
    assert "TLS: new connections to engines use the changed files" in stack.service.log()


def failures(stack: Stack) -> list[str]:
    """List the failure kinds of all engines."""
    endpoints = stack.service.loads()["endpoints"]
    return [str(each["failure"]).partition(":")[0] for each in endpoints]


def test_prefill_legs_of_the_service_use_tls(fleet: Fleet) -> None:
    """Envoy has no way to prefill engines then."""
    pool = {
        "models": ["*"],
        "prefill": {"endpoints": [each.url for each in fleet.stack.prefills]},
        "decode": {"endpoints": [each.url for each in fleet.stack.decodes]},
    }
    content = {**write_config([pool], engine_tls=fleet.settings), "prefill_leg": "service"}
    with (
        ServiceProcess(content) as service,
        EnvoyProcess(service.config) as envoy,
        loopback.client(envoy.url, timeout=60) as client,
    ):
        service.wait_until_fresh()
        service.wait_until_ready()
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        assert 'dp_extproc_prefill_legs_total{outcome="answered"} 1.0' in service.metrics()
