"""HEALTHCHECK of the image: which process is checked, at which address, and which responses are healthy."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from dp_extproc.config import ListenSettings
from dp_extproc.lab.engine.settings import Settings
from dp_extproc.lab.testbed.engine import EngineProcess
from dp_extproc.lab.testbed.ports import free_port
from dp_extproc.lab.testbed.service import ServiceProcess, write_config
from dp_extproc.runtime import container_health
from dp_extproc.runtime.container_health import Check, check_for, main

INIT = ("/sbin/docker-init", "--")
SCRIPT = ("/app/bin/python3", "/app/bin/dp-extproc")
MODULE = ("python", "-m", "dp_extproc")


def asked(command_line: tuple[str, ...], *, ready: bool = False) -> tuple[str, int, str] | None:
    check = check_for(command_line, ready=ready)
    return None if check is None else (check.host, check.port, check.path)


@contextmanager
def server_that_says(answer: bytes) -> Iterator[int]:
    """Answer one connection with these bytes."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


@pytest.mark.parametrize("before", [SCRIPT, MODULE, INIT + SCRIPT, ("dp-extproc",)])
@pytest.mark.parametrize("option", [("-c", "FILE"), ("-cFILE",), ("--config", "FILE"), ("--config=FILE",)])
@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("pools: []", ("127.0.0.1", 9090)),
        ("listen: {admin: 0.0.0.0:9191}", ("127.0.0.1", 9191)),
        ("listen: {admin: 10.0.0.7:9191}", ("10.0.0.7", 9191)),
        ('listen: {admin: "[::]:9191"}', ("::1", 9191)),
        ("listen: {admin: {host: 0.0.0.0, port: 9191}}", ("127.0.0.1", 9191)),
        ("listen:", ("127.0.0.1", 9090)),
        ("", ("127.0.0.1", 9090)),
    ],
)
def test_service_is_checked_at_the_admin_port_of_its_file(
    tmp_path: Path, before: tuple[str, ...], option: tuple[str, ...], text: str, address: tuple[str, int]
) -> None:
    """The command line may differ, and a wildcard address is checked at the loopback address."""
    file = tmp_path / "dp-extproc.yaml"
    file.write_text(text, encoding="utf-8")
    line = (*before, "serve", *(word.replace("FILE", str(file)) for word in option), "--log-level", "info")
    assert asked(line) == (*address, "/healthz")
    assert asked(line, ready=True) == (*address, "/readyz")


@pytest.mark.parametrize(
    ("options", "environment", "address"),
    [
        (("--prefill", "http://a:1", "--decode", "http://b:1"), {}, ("127.0.0.1", 9090)),
        (("--workers", "http://a:1", "--admin", "0.0.0.0:9191"), {}, ("127.0.0.1", 9191)),
        (("--workers=http://a:1", "--admin=[::]:9191"), {"DP_EXTPROC_CONFIG": "/nowhere"}, ("::1", 9191)),
        ((), {"DP_EXTPROC_WORKERS": "http://a:1", "DP_EXTPROC_ADMIN": " 10.0.0.7:9191\n"}, ("10.0.0.7", 9191)),
        (("--workers", "4"), {"DP_EXTPROC_CONFIG": "FILE"}, ("127.0.0.1", 9191)),
        ((), {"DP_EXTPROC_CONFIG": "FILE", "ADMIN_PORT": "9192"}, ("127.0.0.1", 9192)),
        (("-c", "FILE"), {"DP_EXTPROC_ADMIN": "10.0.0.7:9191"}, ("127.0.0.1", 9191)),
        (("-c", "-"), {"DP_EXTPROC_ADMIN": "10.0.0.7:9191"}, ("127.0.0.1", 9090)),
    ],
)
def test_service_without_a_file_is_checked_at_the_admin_port_that_was_given(
    tmp_path: Path, options: tuple[str, ...], environment: dict[str, str], address: tuple[str, int]
) -> None:
    """Options and variables count as for ``serve``; a file may have variables in its values."""
    file = tmp_path / "dp-extproc.yaml"
    file.write_text("listen: {admin: '0.0.0.0:${ADMIN_PORT:-9191}'}", encoding="utf-8")
    line = (*SCRIPT, "serve", *(word.replace("FILE", str(file)) for word in options))
    given = {name: value.replace("FILE", str(file)) for name, value in environment.items()}
    check = check_for(line, ready=False, environment=given)
    assert check is not None
    assert (check.host, check.port) == address


def test_engine_is_checked_at_its_port() -> None:
    """A wildcard address is checked at the loopback address."""
    line = (*INIT, *SCRIPT, "engine", "--role", "prefill", "--host", "0.0.0.0", "--port=30000")
    assert asked(line) == ("127.0.0.1", 30000, "/v1/models")
    assert asked((*SCRIPT, "engine", "--port", "30000")) == ("127.0.0.1", 30000, "/v1/models")
    assert asked((*SCRIPT, "engine", "--host", "localhost", "--port", "30000")) == ("localhost", 30000, "/v1/models")


@pytest.mark.parametrize(
    "line", [(*SCRIPT, "check", "-c", "x"), (*SCRIPT, "load"), SCRIPT, ("sh",), ("sleep", "9"), ()]
)
def test_other_commands_are_healthy_while_they_run(line: tuple[str, ...]) -> None:
    """They have no port to check."""
    assert check_for(line, ready=False) is None
    assert main([], line) == 0


def test_defaults_equal_those_of_the_commands() -> None:
    """They are written twice, since the check loads nothing of the service."""
    assert str(ListenSettings().admin) == container_health._DEFAULT_ADMIN
    assert Settings().host == container_health._DEFAULT_ENGINE_HOST


@pytest.mark.parametrize("text", ["listen: {admin: nonsense}", "listen: [", "listen: {admin: localhost:9090}", "\x00"])
def test_unusable_file_is_unhealthy(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The reason is one line, without a traceback."""
    file = tmp_path / "dp-extproc.yaml"
    file.write_text(text, encoding="utf-8")
    assert main([], (*SCRIPT, "serve", "-c", str(file))) == 1
    assert capsys.readouterr().err.startswith("not well: ")


def test_missing_file_is_unhealthy(capsys: pytest.CaptureFixture[str]) -> None:
    """So is a command line without a file."""
    assert main([], (*SCRIPT, "serve", "-c", "/nowhere/dp-extproc.yaml")) == 1
    assert main([], (*SCRIPT, "serve")) == 1
    assert "/nowhere/dp-extproc.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-server\r\n", b"HTTP/1.1 200 OK", b"HTTP/1.1 503 No\r\n\r\n", b"\n" * 9]
)
def test_only_a_healthy_response_counts(answer: bytes, tmp_path: Path) -> None:
    """Another process on the port, a closed connection and a service that is not ready are unhealthy."""
    file = tmp_path / "dp-extproc.yaml"
    with server_that_says(answer) as port:
        file.write_text(f"listen: {{admin: 127.0.0.1:{port}}}", encoding="utf-8")
        assert main(["--ready"], (*SCRIPT, "serve", "-c", str(file))) == (0 if b" 200 " in answer else 1)


def test_running_service_and_engine_are_healthy_until_they_end(tmp_path: Path) -> None:
    """A service without engines is alive, but not ready."""
    with EngineProcess("unified", 1, "--api-key", "secret") as engine:
        line = (*SCRIPT, "engine", "--port", str(engine.port))
        assert main([], line) == 0
    assert main([], line) == 1
    content = write_config([{"models": ["*"], "workers": {"endpoints": [f"http://127.0.0.1:{free_port()}"]}}])
    with ServiceProcess(content) as service:
        line = (*SCRIPT, "serve", "-c", str(service._config_path))
        assert main([], line) == 0
        assert main(["--ready"], line) == 1
    file = tmp_path / "dp-extproc.yaml"
    file.write_text(f"listen: {{admin: {service.config.listen.admin}}}", encoding="utf-8")
    assert main([], (*SCRIPT, "serve", "-c", str(file))) == 1


def test_check_has_the_healthy_statuses_of_its_process() -> None:
    """A service with status 404 is unhealthy; an engine that wants a key is healthy."""
    check = check_for((*SCRIPT, "engine", "--port", "1"), ready=False)
    assert check == Check("127.0.0.1", 1, "/v1/models", range(100, 600))
