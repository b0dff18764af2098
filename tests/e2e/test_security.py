"""TLS between Envoy and the service, and API keys between everybody and the engines."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dp_extproc.config import SocketAddress
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from e2e.stack import Stack, run_stack
from patience import wait_for

KEY = "sk-a-key-that-is-nowhere-else"
OTHER_KEY = "sk-another-one"
REQUEST = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
NAME = "dp-extproc.test"


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a directory."""

    directory: Path

    @classmethod
    def found(cls, directory: Path) -> "Authority":
        authority = cls(directory)
        _openssl("req", "-x509", *_new_key(directory / "ca.key"), "-out", authority.ca, "-subj", "/CN=test authority")
        return authority

    @property
    def ca(self) -> str:
        return str(self.directory / "ca.pem")

    def issue(self, file: str, name: str = NAME) -> dict[str, str]:
        """Make a certificate for a name, over one that may be there. Returns where it and its key are."""
        cert, key, request = (str(self.directory / f"{file}.{end}") for end in ("pem", "key", "csr"))
        _openssl(
            "req", *_new_key(Path(key)), "-out", request, "-subj", "/CN=x", "-addext", f"subjectAltName=DNS:{name}"
        )
        own = ("-CA", self.ca, "-CAkey", str(self.directory / "ca.key"), "-CAcreateserial")
        _openssl("x509", "-req", "-in", request, *own, "-copy_extensions", "copy", "-out", cert)
        return {"cert": cert, "key": key}


def _new_key(path: Path) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(path))


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.found(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[Stack]:
    """A fleet where Envoy and the service show each other certificates."""
    listen = {"tls": {**authority.issue("service"), "client_ca": authority.ca}}
    envoy = {"service_tls": {**authority.issue("envoy", "envoy.test"), "ca": authority.ca, "name": NAME}}
    with run_stack(listen=listen, envoy=envoy) as stack:
        yield stack


def prefill_is_reported(stack: Stack) -> bool:
    """Tell whether the stream of a prefill leg has found its way to the process that placed the request."""
    return "dp_extproc_missing_prefill_legs_total 0.0" in stack.service.metrics()


def test_both_clusters_of_the_service_speak_tls(mutual: Stack) -> None:
    """Requests are placed, and prefill legs are reported to their owner, which is dialled by IP."""
    answers = [mutual.client.post("/generate", json=REQUEST).status_code for _ in range(5)]

    assert answers == [200] * 5
    mutual.service.wait_until_idle()
    assert prefill_is_reported(mutual)
    stats = httpx.get(f"{mutual.envoy.admin_url}/stats?filter=extproc.*ssl.handshake").text
    counts = dict(line.split(": ") for line in stats.splitlines())
    assert {name for name, count in counts.items() if int(count)} == {
        "cluster.extproc.ssl.handshake",
        "cluster.extproc_owner.ssl.handshake",
    }


@pytest.mark.parametrize("credentials", ["none", "certificate of nobody", "certificate of ours"])
def test_nobody_without_a_certificate_gets_in(mutual: Stack, authority: Authority, credentials: str) -> None:
    """With client_ca the service talks to those alone who have a certificate of that authority."""
    ca = Path(authority.ca).read_bytes()
    key = cert = None
    if credentials != "none":
        issuer = authority
        if credentials == "certificate of nobody":
            (authority.directory / "nobody").mkdir()
            issuer = Authority.found(authority.directory / "nobody")
        files = issuer.issue("client", "client.test")
        key, cert = Path(files["key"]).read_bytes(), Path(files["cert"]).read_bytes()
    channel = grpc.secure_channel(
        str(mutual.service.config.listen.grpc),
        grpc.ssl_channel_credentials(ca, key, cert),
        options=[("grpc.ssl_target_name_override", NAME)],
    )
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        if credentials == "certificate of ours":
            assert check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
        else:
            with pytest.raises(grpc.RpcError) as refused:
                check(health_pb2.HealthCheckRequest(), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_new_certificates_are_taken_without_a_restart(mutual: Stack, authority: Authority) -> None:
    """The next handshake after the files have changed shows the new certificate."""

    def shown() -> str:
        host, port = mutual.service.config.listen.grpc.host, mutual.service.config.listen.grpc.port
        client = authority.issue("prober", "prober.test")
        argv = ["openssl", "s_client", "-connect", f"{host}:{port}", "-cert", client["cert"], "-key", client["key"]]
        return subprocess.run(argv, input=b"", capture_output=True, check=False).stdout.decode().split("-----")[2]

    before = shown()
    assert shown() == before
    authority.issue("service")
    wait_for(lambda: shown() != before)
    assert "TLS: new connections get the new certificate" in mutual.service.log()


def test_envoy_talks_to_nobody_with_another_name(mutual: Stack, authority: Authority) -> None:
    """A certificate of the right authority for another name is not enough: nothing is placed."""
    settings = mutual.service.config.envoy.service_tls
    assert settings is not None
    wrong = settings.model_copy(update={"name": "somebody.else"})
    config = mutual.service.config
    envoy = config.envoy.model_copy(update={"service_tls": wrong, **_free_addresses()})
    with EnvoyProcess(config.model_copy(update={"envoy": envoy})) as front:
        answer = httpx.post(f"{front.url}/generate", json=REQUEST, timeout=30, trust_env=False)

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_unavailable"


def _free_addresses() -> dict[str, object]:
    inference, admin = (SocketAddress(host="127.0.0.1", port=port) for port in free_ports(2))
    return {"inference": inference, "admin": admin}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "api-key"
    path.write_text(f"{KEY}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def locked(key_file: Path) -> Iterator[Stack]:
    """Engines that want a key, which the service has from a file."""
    with run_stack(options=("--api-key", KEY), api_key={"file": str(key_file)}) as stack:
        yield stack


def test_engines_are_shown_the_key_on_both_legs(locked: Stack) -> None:
    """Whatever a client shows is replaced: it is the service that the engines trust."""
    locked.forget()
    answer = locked.client.post("/generate", json=REQUEST, headers={"authorization": "Bearer of-the-client"})

    assert answer.status_code == 200
    for leg in locked.legs():
        assert leg["headers"]["authorization"] == f"Bearer {KEY}"


def test_requests_that_any_engine_answers_show_the_key_too(locked: Stack) -> None:
    """A page of an engine that is asked for through Envoy is not refused."""
    assert locked.client.get("/model_info").status_code == 200


def test_the_key_is_shown_to_nobody_else(locked: Stack) -> None:
    """Neither pages, logs nor Envoy's configuration and access log repeat it."""
    locked.client.post("/generate", json=REQUEST)
    shown = {
        "loads": json.dumps(locked.service.loads()),
        "metrics": locked.service.metrics(),
        "service log": locked.service.log(),
        "config dump": httpx.get(f"{locked.envoy.admin_url}/config_dump").text,
        "access log": json.dumps(locked.envoy.access_log()),
        "envoy log": locked.envoy.log(),
        "configuration": repr(locked.service.config),
    }

    assert [place for place, text in shown.items() if KEY in text] == []


def test_a_new_key_is_taken_from_its_file(locked: Stack, key_file: Path) -> None:
    """Keys may be replaced while the service runs; one that is unreadable changes nothing."""

    def key_shown() -> str:
        locked.forget()
        locked.client.post("/generate", json=REQUEST)
        return str(locked.received()[0]["headers"]["authorization"])

    key_file.write_text("two words\n", encoding="utf-8")
    wait_for(lambda: "the key that was there before stays in use" in locked.service.log())
    assert key_shown() == f"Bearer {KEY}"
    key_file.write_text(OTHER_KEY, encoding="utf-8")
    # The engines still want the first one, so the new one shows in what they refuse.
    wait_for(
        lambda: any("refuses the API key" in (each["failure"] or "") for each in locked.service.loads()["endpoints"])
    )
    assert OTHER_KEY not in locked.service.log()
    key_file.write_text(KEY, encoding="utf-8")
    wait_for(lambda: locked.client.post("/generate", json=REQUEST).status_code == 200)
