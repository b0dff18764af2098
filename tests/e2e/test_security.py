"""TLS protects the connections between Envoy and the service, and API keys those to the engines."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from certificates import NAME, Authority
from dp_extproc.config import SocketAddress
from dp_extproc.lab.testbed.envoy import EnvoyProcess
from dp_extproc.lab.testbed.ports import free_ports
from e2e.stack import Stack, run_stack
from patience import wait_for

KEY = "sk-a-key-that-is-nowhere-else"
OTHER_KEY = "sk-another-one"
REQUEST = {"text": "x", "sampling_params": {"max_new_tokens": 1}}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.found(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[Stack]:
    """Give a fleet where Envoy and the service present certificates to each other."""
    listen = {"tls": {**authority.issue("service"), "client_ca": authority.ca}}
    envoy = {"service_tls": {**authority.issue("envoy", "envoy.test"), "ca": authority.ca, "name": NAME}}
    with run_stack(listen=listen, envoy=envoy) as stack:
        yield stack


def prefill_is_reported(stack: Stack) -> bool:
    """Return whether the stream of a prefill leg has reached the process that scheduled the request."""
    return "dp_extproc_missing_prefill_legs_total 0.0" in stack.service.metrics()


def test_both_clusters_of_the_service_use_tls(mutual: Stack) -> None:
    """Requests are scheduled, and prefill legs reach their owner, to which Envoy connects by IP address."""
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


@pytest.mark.parametrize("credentials", ["none", "certificate of another authority", "certificate of ours"])
def test_a_client_is_rejected_without_a_certificate(mutual: Stack, authority: Authority, credentials: str) -> None:
    """With ``client_ca`` the service accepts only clients that have a certificate of that authority."""
    ca = Path(authority.ca).read_bytes()
    key = cert = None
    if credentials != "none":
        issuer = authority
        if credentials == "certificate of another authority":
            issuer = Authority.found(authority.directory / "another")
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


def test_new_certificates_are_used_without_a_restart(mutual: Stack, authority: Authority) -> None:
    """The next handshake after the files have changed presents the new certificate."""

    def shown() -> str:
        host, port = mutual.service.config.listen.grpc.host, mutual.service.config.listen.grpc.port
        client = authority.issue("prober", "prober.test")
        argv = ["openssl", "s_client", "-connect", f"{host}:{port}", "-cert", client["cert"], "-key", client["key"]]
        return subprocess.run(argv, input=b"", capture_output=True, check=False).stdout.decode().split("-----")[2]

    before = shown()
    assert shown() == before
    authority.issue("service")
    wait_for(lambda: shown() != before)
    assert "TLS: new connections get what " in mutual.service.log()


def test_envoy_rejects_a_certificate_for_another_name(mutual: Stack, authority: Authority) -> None:
    """A certificate of the right authority for another name is not enough, so no request is scheduled."""
    settings = mutual.service.config.envoy.service_tls
    assert settings is not None
    wrong = settings.model_copy(update={"name": "another.name"})
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
    """Give engines that need a key, which the service reads from a file."""
    with run_stack(options=("--api-key", KEY), api_key={"file": str(key_file)}) as stack:
        yield stack


def test_engines_get_the_key_on_both_legs(locked: Stack) -> None:
    """The key of the pool replaces the client's, because the engines trust the service."""
    locked.forget()
    answer = locked.client.post("/generate", json=REQUEST, headers={"authorization": "Bearer of-the-client"})

    assert answer.status_code == 200
    for leg in locked.legs():
        assert leg["headers"]["authorization"] == f"Bearer {KEY}"


def test_lookups_have_the_key(locked: Stack) -> None:
    """An engine does not reject a lookup that arrives through Envoy."""
    assert locked.client.get("/model_info").status_code == 200


def test_the_key_appears_in_no_page_or_log(locked: Stack) -> None:
    """Neither pages and logs nor Envoy's configuration and access log contain the key."""
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


def test_a_new_key_is_read_from_its_file(locked: Stack, key_file: Path) -> None:
    """A key may be replaced while the service runs, and an unreadable one changes nothing."""

    def key_shown() -> str:
        locked.forget()
        locked.client.post("/generate", json=REQUEST)
        return str(locked.received()[0]["headers"]["authorization"])

    key_file.write_text("two words\n", encoding="utf-8")
    wait_for(lambda: "the key that was there before stays in use" in locked.service.log())
    assert key_shown() == f"Bearer {KEY}"
    key_file.write_text(OTHER_KEY, encoding="utf-8")
    # The engines still need the first one, so their rejection shows that the new one is in use.
    wait_for(
        lambda: any("refuses the API key" in (each["failure"] or "") for each in locked.service.loads()["endpoints"])
    )
    assert OTHER_KEY not in locked.service.log()
    key_file.write_text(KEY, encoding="utf-8")
    wait_for(lambda: locked.client.post("/generate", json=REQUEST).status_code == 200)
