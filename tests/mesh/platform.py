"""The Envoy of a platform team, joined to the printed parts as the page describes, and the servers around it."""

import base64
import hashlib
import hmac
import json
import re
import ssl
import string
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx

from dp_extproc.config import Config
from dp_extproc.envoy_config import FORMS
from dp_extproc.envoy_config.formats.target import Target

PAGE: Final = Path(__file__).parents[2] / "docs" / "mesh" / "envoy.md"
LLM: Final = "llm.example.com"
SHOP: Final = "shop.example.com"
"""The hosts of the platform: ours, and a neighbour on the same listener."""
_TEMPLATE: Final = Path(__file__).with_name("platform.yaml")
_JWT_KEY: Final = b"a key of thirty-two bytes, or so"


@dataclass
class Servers:
    """The neighbour's backend, the authorization server and the collector of spans, on one port."""

    port: int = 0
    spans: int = 0
    """Reports of the tracer."""
    attempts: Counter[str] = field(default_factory=Counter)
    """Requests of the neighbour that arrived here, by path."""


@contextmanager
def run_servers() -> Iterator[Servers]:
    """Run the servers."""
    servers = Servers()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", "0")))
            if self.path == "/v1/traces":
                servers.spans += 1
                self._answer(200)
            elif self.path.startswith("/authz/"):
                self._answer(403 if self.headers.get("x-tenant") == "banned" else 200)
            else:
                servers.attempts[self.path] += 1
                if self.path.startswith("/slow"):
                    time.sleep(1.5)  # longer than the platform allows
                fails = self.path.startswith("/flaky") and servers.attempts[self.path] == 1
                self._answer(503 if fails else 200, dict(self.headers.items()))

        do_POST = do_OPTIONS = do_GET  # noqa: N815 - the names that the base class wants

        def _answer(self, status: int, echoed: Mapping[str, str] | None = None) -> None:
            body = json.dumps(echoed).encode() if echoed is not None else b""
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            if echoed is not None:
                self.send_header("x-dp-retry", "of the neighbour")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    servers.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield servers
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True)
class Certificate:
    """A certificate that signs itself, with its key."""

    cert: Path
    key: Path

    @classmethod
    def make(cls, directory: Path) -> "Certificate":
        made = cls(directory / "platform.pem", directory / "platform.key")
        names = f"subjectAltName=IP:127.0.0.1,DNS:{LLM},DNS:{SHOP}"
        options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x", "-addext", names]
        paths = ["-keyout", str(made.key), "-out", str(made.cert)]
        subprocess.run(["openssl", "req", "-x509", *options, *paths], check=True, capture_output=True)
        return made


def read_bootstrap(config: Config, servers: Servers, certificate: Certificate) -> str:
    """Read the bootstrap of the team, with the ports of a test."""
    template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
    ports = dict.fromkeys(("SHOP_PORT", "AUTHZ_PORT", "OTEL_PORT"), servers.port)
    return template.substitute(
        ports,
        PORT=config.envoy.inference.port,
        ADMIN_PORT=config.envoy.admin.port,
        CERT=certificate.cert,
        KEY=certificate.key,
        JWT_KEY=_base64(_JWT_KEY),
    )


def join(bootstrap: str, config: Config, directory: Path, virtual_host: str = "llm") -> str:
    """Follow the steps of the page: print the parts, and join them to a bootstrap with the script there."""
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    parts = directory / f"parts-{virtual_host}"
    parts.mkdir()
    for name, text in FORMS["parts"].files(config, Target()).items():
        (parts / name).write_text(text, encoding="utf-8")
    (directory / "join.py").write_text(script, encoding="utf-8")
    (directory / "envoy.yaml").write_text(bootstrap, encoding="utf-8")
    argv = [sys.executable, "join.py", "envoy.yaml", virtual_host, parts.name]
    return subprocess.run(argv, cwd=directory, check=True, capture_output=True, text=True).stdout


def client_of(config: Config, certificate: Certificate, host: str, **headers: str) -> httpx.Client:
    """Make a client of a host of the platform."""
    return httpx.Client(
        base_url=f"https://127.0.0.1:{config.envoy.inference.port}",
        headers={"host": host, **headers},
        verify=ssl.create_default_context(cafile=str(certificate.cert)),
        trust_env=False,
        timeout=30,
    )


def token(subject: str) -> str:
    """Sign a token of the platform for a client, as a value of the header ``authorization``."""
    claims = {"iss": "platform", "sub": subject, "exp": int(time.time()) + 3600}
    signed = ".".join(_base64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    return f"Bearer {signed}.{_base64(hmac.digest(_JWT_KEY, signed.encode(), hashlib.sha256))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
