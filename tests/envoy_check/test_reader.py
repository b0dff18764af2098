"""An Envoy is read from its admin address and from files. What is no Envoy is refused with a reason."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from dp_extproc.envoy_check import Snapshot, UnreadableError
from dp_extproc.envoy_check.reader import read_envoy
from dp_extproc.lab.testbed.ports import free_port
from envoy_check.samples import bootstrap_of, dump_of, example_config

HTML = b"<!doctype html><title>Some page</title>"


@contextmanager
def pages(answers: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    """Serve pages by path, as an Envoy's admin address does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path.partition("?")[0], (404, b"no such page"))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def read(*sources: str | Path) -> Snapshot:
    return asyncio.run(read_envoy([str(each) for each in sources]))


def refusal(*sources: str | Path) -> str:
    with pytest.raises(UnreadableError) as caught:
        read(*sources)
    return str(caught.value)


def test_pages_of_the_admin_address_are_read_together() -> None:
    """The dump has the resources, and /server_info the exact version, the state, and the time for drains."""
    dump = json.dumps(dump_of(bootstrap_of(example_config()))).encode()
    info = {"version": "abc/1.39.3/Clean", "state": "LIVE", "command_line_options": {"drain_time": "60s"}}
    with pages({"/config_dump": (200, dump), "/server_info": (200, json.dumps(info).encode())}) as url:
        snapshot = read(url)

    assert (snapshot.version, snapshot.state, snapshot.drain_seconds) == ((1, 39, 3), "LIVE", 60.0)
    assert len(snapshot.clusters) == 7


def test_missing_server_info_leaves_the_dump() -> None:
    """Some gateways let only the dump through."""
    dump = json.dumps(dump_of(bootstrap_of(example_config()))).encode()
    with pages({"/config_dump": (200, dump)}) as url:
        snapshot = read(f"{url}/config_dump?include_eds")

    assert (snapshot.version, snapshot.state) == ((1, 40, 0), None)


@pytest.mark.parametrize(
    ("status", "page", "reason"),
    [
        (200, HTML, "is no complete JSON"),
        (200, b'{"configs": [{"@type": "x"', "is no complete JSON"),
        (200, b"[" * 100_000, "is no complete JSON"),
        (200, b"[]", "a mapping is expected, and it is list"),
        (200, b'{"configs": 1}', "configs is expected to be a list, and it is int"),
        (200, b'{"status": "ok"}', "it has none of the keys"),
        (404, HTML, "answered 404; is this Envoy's admin address?"),
    ],
)
def test_page_that_is_no_dump_is_refused(status: int, page: bytes, reason: str) -> None:
    """The refusal begins with the address and says what came instead."""
    with pages({"/config_dump": (status, page)}) as url:
        assert refusal(url).startswith(f"{url}: ")
        assert reason in refusal(url)


def test_address_without_a_server_is_refused() -> None:
    """Nothing listens there."""
    url = f"http://127.0.0.1:{free_port()}"

    assert refusal(url).startswith(f"{url}: no connection")


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b", "https://127.0.0.1:x"])
def test_malformed_url_is_refused(url: str) -> None:
    """It ends with a reason and not in a look-up."""
    assert refusal(url).startswith(f"{url}: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"\xff\xfe", "is no text in UTF-8"),
        (b"a: [1\nb: 2\n", "line 2: is not valid YAML"),
        (b"just words", "a mapping is expected, and it is str"),
        (b"[1, 2]", "a mapping is expected, and it is list"),
        (b"pools: []\n", "it has none of the keys"),
        (b"apiVersion: v1\nkind: EnvoyFilter\n", "a resource of Kubernetes (EnvoyFilter)"),
        (b"static_resources: {listeners: {}, clusters: 7}\n", "clusters is expected to be a list, and it is int"),
        (b"static_resources: [1]\n", "a mapping is expected, and it is list"),
        (b'{"a": {"configs": []}, "b": {"configs": []}}', "it has 2 dumps"),
    ],
)
def test_file_without_an_envoy_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    """The refusal begins with the file and says what is in it instead."""
    path = tmp_path / "envoy.yaml"
    path.write_bytes(content)

    assert refusal(path).startswith(f"{path}: ")
    assert reason in refusal(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """So is a directory without files."""
    assert refusal(tmp_path / "no.json") == f"{tmp_path}/no.json: cannot be read: No such file or directory"


def test_files_are_read_together(tmp_path: Path) -> None:
    """A bootstrap and files for xDS; a directory stands for the files in it, and a file may have several documents."""
    bootstrap = bootstrap_of(example_config())
    static = bootstrap.pop("static_resources")
    (tmp_path / "bootstrap.yaml").write_text(yaml.safe_dump({**bootstrap, "dynamic_resources": {}}))
    (tmp_path / "xds").mkdir()
    for kind, key in (("Listener", "listeners"), ("Cluster", "clusters")):
        wrapped = [{"@type": f"type.googleapis.com/envoy.config.x.v3.{kind}", **each} for each in static[key]]
        (tmp_path / "xds" / f"{kind}.yaml").write_text(yaml.safe_dump({"version_info": "1", "resources": wrapped}))
    (tmp_path / "xds" / "README.md").write_text("Not read.")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump_all([{"listeners": [{"name": "a"}]}, {"clusters": [{}]}]))

    snapshot = read(tmp_path / "bootstrap.yaml", tmp_path / "xds", tmp_path / "two.yaml")

    assert snapshot.extensions == ["InternalListener"]
    assert (len(snapshot.listeners), len(snapshot.clusters)) == (5, 8)


def test_dump_below_namespace_and_pod_is_read(tmp_path: Path) -> None:
    """This is how ``egctl config envoy-proxy all -o json`` prints it."""
    path = tmp_path / "dump.json"
    path.write_text(json.dumps({"envoy-gateway-system": {"envoy-a": dump_of(bootstrap_of(example_config()))}}))

    assert len(read(path).listeners) == 4
