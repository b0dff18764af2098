"""Files and variables that the configuration refers to: their problems are reported before the start."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from certificates import Authority
from dp_extproc.config import EngineTls, ServerTls, parse_config
from dp_extproc.lab.testbed.service import write_config
from dp_extproc.runtime.engine_tls import FollowedTls
from dp_extproc.runtime.secrets import external_problems, read_api_keys, server_credentials
from dp_extproc.runtime.sockets import StartError

POOL = {"models": ["*"], "workers": {"endpoints": ["http://127.0.0.1:9"]}}
SECRET = "sk-very-secret"
VARIABLE = "DP_EXTPROC_TEST_KEY"


def with_key(source: dict[str, str]) -> dict[str, Any]:
    return {"pools": [{**POOL, "api_key": source}]}


def with_tls(**files: str) -> dict[str, Any]:
    return {"pools": [POOL], "listen": {"tls": files}, "envoy": {"service_tls": {"ca": "/etc/ca.pem", "name": "dp"}}}


def problems_of(content: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in external_problems(parse_config(yaml.safe_dump(content)))]


KEYS = {
    "a word": (f"{SECRET}\n", None),
    "empty": (" \n", "holds no key"),
    "two lines": (f"{SECRET}\nx-injected: 1", "more than one word of printable ASCII"),
    "not ASCII": (f"{SECRET}\u00e9", "more than one word of printable ASCII"),
    "no text": (b"\xff\xfe", "cannot be read: it is not UTF-8"),
    "no file": (None, "cannot be read: No such file or directory"),
}


@pytest.mark.parametrize(("content", "expected"), KEYS.values(), ids=KEYS)
def test_api_key_is_read_from_a_file(tmp_path: Path, content: str | bytes | None, expected: str | None) -> None:
    """A key is one word that a header can carry. Other contents are refused, and never shown."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems = problems_of(with_key({"file": str(path)}))

    assert len(problems) == (0 if expected is None else 1)
    assert (expected or "") in "".join(problems)
    assert SECRET not in "".join(problems)


def test_api_key_is_read_from_the_environment() -> None:
    """The problem of a missing variable has its name."""
    config = parse_config(yaml.safe_dump(with_key({"env": VARIABLE})))

    assert read_api_keys(config, {VARIABLE: f"{SECRET}\n"}).by_pool == {"*": SECRET}
    missing = read_api_keys(config, {})
    assert [str(problem) for problem in missing.problems] == [f"pools[0].api_key: the variable {VARIABLE} holds no key"]
    assert SECRET not in repr(read_api_keys(config, {VARIABLE: SECRET}))


def test_missing_certificate_files_are_all_reported(tmp_path: Path) -> None:
    """The report does not end with the first one."""
    missing = {key: str(tmp_path / key) for key in ("cert", "key", "client_ca")}

    assert problems_of(with_tls(**missing)) == [
        f"listen.tls.{key}: {path} cannot be read: No such file or directory" for key, path in missing.items()
    ]


def test_files_without_certificates_are_reported(tmp_path: Path) -> None:
    """The certificate with its key and the CA bundle are both checked."""
    path = tmp_path / "nothing.pem"
    path.write_text("nothing", encoding="utf-8")
    pair, roots = problems_of(with_tls(cert=str(path), key=str(path), client_ca=str(path)))

    assert pair.startswith(f"listen.tls: {path} and {path} are not a certificate and its key")
    assert roots.startswith(f"listen.tls.client_ca: {path} holds no certificate")


@pytest.mark.parametrize("command", ["serve", "check"])
def test_command_reports_missing_secrets_before_it_starts(tmp_path: Path, command: str) -> None:
    """The status is 2, and no engine is contacted."""
    content = write_config([{**POOL, "api_key": {"file": str(tmp_path / "none")}}])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    argv = [sys.executable, "-m", "dp_extproc", command, "-c", str(path)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    assert result.returncode == 2
    assert result.stdout == ""
    assert "pools[0].api_key: the file " in result.stderr


def test_a_certificate_that_vanishes_before_the_start_is_named(tmp_path: Path) -> None:
    """The files were there when the configuration was checked."""
    tls = ServerTls(cert=str(tmp_path / "cert"), key=str(tmp_path / "key"))

    with pytest.raises(StartError, match=f"^listen.tls: {tmp_path}/cert cannot be read: No such file"):
        server_credentials(tls)


def test_missing_files_of_engine_tls_are_all_reported(tmp_path: Path) -> None:
    """They have the keys of their section."""
    missing = {key: str(tmp_path / key) for key in ("ca", "cert", "key")}
    pool = {"models": ["*"], "workers": {"endpoints": ["https://127.0.0.1:9"]}}

    assert problems_of({"engine_tls": {**missing, "names": ["a"]}, "pools": [pool]}) == [
        f"engine_tls.{key}: {path} cannot be read: No such file or directory" for key, path in missing.items()
    ]


def test_certificates_of_engine_tls_are_followed_through_a_half_replacement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A certificate without its new key is reported as long as it is there, and the log has when the pair is used."""
    caplog.set_level("INFO")
    authority = Authority.found(tmp_path)
    files = authority.issue("client")
    followed = FollowedTls(EngineTls(ca=authority.ca, names=("a",), **files))
    assert followed.renew() == ()
    old, new = Path(files["key"]).read_bytes(), authority.issue("client")
    renewed = Path(new["key"]).read_bytes()

    Path(files["key"]).write_bytes(old)
    for _ in range(2):
        (problem,) = followed.renew()
        assert "are not a certificate and its key" in str(problem)
    assert caplog.messages == []
    Path(files["key"]).write_bytes(renewed)
    for _ in range(2):
        assert followed.renew() == ()
    assert caplog.messages == ["TLS: new connections to engines use the changed files of engine_tls"]
