"""The source ``file`` on real files."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dp_extproc.config.discovery import FileSettings
from dp_extproc.fleet.discovery.file import FileSource
from dp_extproc.fleet.discovery.source import Member, MemberState

DEADLINE = 20.0
A, B = "http://10.0.0.1:30000", "http://10.0.0.2:30000"


@dataclass
class Reports:
    """A listener that keeps the last report, and all failures."""

    members: tuple[Member, ...] | None = None
    failures: list[str] = field(default_factory=list)
    fails: bool = False

    def snapshot(self, members: tuple[Member, ...]) -> None:
        self.members, self.fails = members, False

    def failed(self, message: str) -> None:
        self.failures.append(message)
        self.fails = True

    @property
    def urls(self) -> list[str] | None:
        return None if self.members is None else [each.url for each in self.members]

    async def until(self, condition: Callable[["Reports"], object]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition(self):  # noqa: ASYNC110 - the source sets no event
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[Reports]:
    """Run a source for as long as the block lasts."""
    reports = Reports()
    task = asyncio.create_task(FileSource(FileSettings(path=str(path))).run(reports))
    try:
        yield reports
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


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

    async def story() -> None:
        async with running(path) as reports:
            await reports.until(lambda each: each.members is not None)
            assert reports.members == (
                Member(A, "10.0.0.1", 30000),
                Member(B, "10.0.0.2", 30000, uid="b", name="b", group="g", dp_size=2, bootstrap_port=1),
            )

    asyncio.run(story())


def test_file_source_follows_a_file_that_is_replaced_through_links(tmp_path: Path) -> None:
    """Kubernetes swaps the directory behind a symbolic link."""
    for name, url in (("one", A), ("two", B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "endpoints.yaml").write_text(f"[{{url: '{url}', state: terminating}}]", encoding="utf-8")
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "endpoints.yaml").symlink_to("data/endpoints.yaml")

    async def story() -> None:
        async with running(tmp_path / "endpoints.yaml") as reports:
            await reports.until(lambda each: each.urls == [A])
            (tmp_path / "new").symlink_to("two")
            (tmp_path / "new").replace(tmp_path / "data")
            await reports.until(lambda each: each.urls == [B])
            assert reports.members is not None
            assert reports.members[0].state is MemberState.TERMINATING
            assert reports.failures == []

    asyncio.run(story())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        pytest.param(b"", "must be a list", id="empty"),
        pytest.param(b"- {url: http://10.0.0.1}", "[0].url: name the engine's port", id="no-port"),
        pytest.param(b"- http://10.0.0.1:1\n- {url: http://10.0.0.2:1, sate: ready}", "[1].sate", id="unknown-key"),
        pytest.param(b"- [", "is not valid YAML", id="half-written"),
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

    async def story() -> None:
        async with running(path) as reports:
            await reports.until(lambda each: len(each.failures) >= 2)
            assert part in reports.failures[0]
            assert str(path) in reports.failures[0]
            assert len(set(reports.failures)) == 1
            assert reports.members is None
            path.write_text(f"- {A}", encoding="utf-8")
            await reports.until(lambda each: each.urls == [A] and not each.fails)

    asyncio.run(story())
