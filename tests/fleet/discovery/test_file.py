"""The source ``file`` on real files."""

from pathlib import Path

import pytest

from dp_extproc.config.discovery import FileSettings, MemberState
from dp_extproc.fleet.discovery.file import FileSource
from dp_extproc.fleet.discovery.source import Member
from patience import wait_for
from source_reports import reports_of

A, B = "http://10.0.0.1:30000", "http://10.0.0.2:30000"


def source(path: Path) -> FileSource:
    return FileSource(FileSettings(path=str(path)))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"- {A}\n- {{url: {B}, name: b, group: g, dp_size: 2, bootstrap_port: 1}}\n", id="yaml"),
        pytest.param(
            f'\ufeff[{{"url": "{A}"}}, {{"url": "{B}", "name": "b", "group": "g", "dp_size": 2, "bootstrap_port": 1}}]',
            id="json-with-byte-order-mark",
        ),
        pytest.param(
            f"endpoints:\n- {A}\n- {{url: {B}, name: b, group: g, dp_size: 2, bootstrap_port: 1}}\n", id="mapping"
        ),
    ],
)
def test_file_source_reports_every_entry(tmp_path: Path, text: str) -> None:
    """An entry is a URL, or a mapping with the keys of an endpoint, a name and a state."""
    path = tmp_path / "endpoints"
    path.write_text(text, encoding="utf-8")

    with reports_of(source(path)) as reports:
        wait_for(lambda: reports.snapshots)

    assert reports.snapshots[0] == (
        Member(A, "10.0.0.1", 30000),
        Member(B, "10.0.0.2", 30000, uid="b", name="b", group="g", dp_size=2, bootstrap_port=1),
    )


def test_file_source_follows_a_file_that_is_replaced_through_links(tmp_path: Path) -> None:
    """Kubernetes swaps the directory behind a symbolic link."""
    for name, url in (("one", A), ("two", B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "endpoints.yaml").write_text(f"[{{url: '{url}', state: terminating}}]", encoding="utf-8")
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "endpoints.yaml").symlink_to("data/endpoints.yaml")

    with reports_of(source(tmp_path / "endpoints.yaml")) as reports:
        wait_for(lambda: reports.urls == {A})
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").replace(tmp_path / "data")
        wait_for(lambda: reports.urls == {B})

    assert reports.snapshots[-1][0].state is MemberState.TERMINATING
    assert reports.failures == []


@pytest.mark.parametrize(
    ("content", "part"),
    [
        pytest.param(b"", "must be a list", id="empty"),
        pytest.param(b"- {url: http://10.0.0.1}", "[0].url: name the engine's port", id="no-port"),
        pytest.param(b"- http://10.0.0.1:1\n- {url: http://10.0.0.2:1, sate: ready}", "[1].sate", id="unknown-key"),
        pytest.param(b"- [", "is not valid YAML", id="half-written"),
        pytest.param(b"- !!bool x", "does not fit its tag", id="wrong-tag"),
        pytest.param(b"pools: []", "must be a list", id="another-file"),
        pytest.param(b"\xff\xfe", "is not UTF-8", id="binary"),
        pytest.param(b"#" * ((1 << 20) + 1), "larger than 1048576 bytes", id="large"),
        pytest.param(b"[" * 100_000, "nest", id="deep"),
        pytest.param(None, "cannot be read: No such file", id="missing"),
    ],
)
def test_file_source_fails_on_a_file_that_cannot_be_used(tmp_path: Path, content: bytes | None, part: str) -> None:
    """It repeats the reason, and reports again when the file is right."""
    path = tmp_path / "endpoints.yaml"
    if content is not None:
        path.write_bytes(content)

    with reports_of(source(path)) as reports:
        wait_for(lambda: len(reports.failures) >= 2)
        assert part in reports.failures[0]
        assert len(set(reports.failures)) == 1
        assert reports.urls is None
        path.write_text(f"- {A}", encoding="utf-8")
        wait_for(lambda: reports.urls == {A})
    assert not reports.is_failing
