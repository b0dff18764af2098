"""The command ``dp-extproc check``, as a process against engines on real sockets."""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from dp_extproc.config import LoadSettings
from dp_extproc.engines.listener import EngineFailure
from dp_extproc.engines.model import Endpoint, Role
from dp_extproc.fleet.check import check_engines
from dp_extproc.fleet.sources.polling import EnginePoller
from dp_extproc.lab.testbed.ports import free_port
from fleet.discovery.dns_server import dns_server
from fleet.scripted_engine import Answer, ScriptedEngine, hang
from ipv6 import needs_ipv6

RECORDED = Path(__file__).parents[1] / "engines" / "recorded"


def pages(mode: str, version: str = "0.5.23", ranks: int = 2, **info: object) -> dict[str, Answer]:
    loads = [{"dp_rank": rank, "num_used_tokens": 0} for rank in range(ranks)]
    reported = {"version": version, "dp_size": ranks, "disaggregation_mode": mode, "enable_dp_attention": True} | info
    return {"/server_info": json.dumps(reported).encode(), "/v1/loads": json.dumps({"loads": loads}).encode()}


async def check(config: str, directory: Path) -> tuple[int, str, str]:
    """Run the command on a configuration. Returns exit status, stdout and stderr."""
    path = directory / "config.yaml"
    path.write_text(config, encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dp_extproc", "check", "-c", str(path),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, out.decode(), err.decode()


def row_of(url: str, out: str) -> list[str]:
    return next(line.split() for line in out.splitlines() if line.startswith(f"{url} "))


def test_check_prints_a_table_of_a_good_fleet(tmp_path: Path) -> None:
    """There is one line per engine, and the exit status is 0."""

    async def story() -> None:
        async with (
            ScriptedEngine() as prefill,
            ScriptedEngine(pages("decode", ranks=4)) as decode,
            ScriptedEngine() as registry,
        ):
            prefill.pages = pages("prefill", ranks=1, disaggregation_bootstrap_port=registry.port)
            status, out, err = await check(
                f'pools: [{{models: ["*"], prefill: {{endpoints: ["{prefill.url}"]}},'
                f' decode: {{endpoints: ["{decode.url}"]}}}}]',
                tmp_path,
            )

            assert (status, err) == (0, "")
            registry_at = f"127.0.0.1:{registry.port}"
            assert row_of(prefill.url, out) == [
                prefill.url, "prefill", "*", "0.5.23", "1", registry_at, "/v1/loads", "ok",
            ]  # fmt: skip
            assert row_of(decode.url, out) == [decode.url, "decode", "*", "0.5.23", "4", "-", "/v1/loads", "ok"]
            assert out.endswith("2 engines can be used\n")
            assert "\x1b" not in out

    asyncio.run(story())


def test_check_finds_an_engine_in_the_wrong_role(tmp_path: Path) -> None:
    """Its pages are those of a real engine."""

    async def story() -> None:
        recorded: dict[str, Answer] = {
            "/server_info": (RECORDED / "pd_dpattn/decode_server_info.json").read_bytes(),
            "/v1/loads": (RECORDED / "pd_dpattn/decode_loads.json").read_bytes(),
        }
        async with ScriptedEngine(recorded) as engine:
            status, out, _ = await check(
                f'pools: [{{models: [m], workers: {{endpoints: ["{engine.url}"]}}}}]', tmp_path
            )

            assert status == 1
            assert row_of(engine.url, out) == [engine.url, "worker", "m", "0.5.23", "2", "-", "/v1/loads", "unusable"]
            assert f"wrong_mode: {engine.url}" in out
            assert "remedy: start it with --disaggregation-mode null" in out

    asyncio.run(story())


def test_check_gives_the_reason_of_each_failure(tmp_path: Path) -> None:
    """Engines hang, are away or hide their load; the exit status is 1."""

    async def story() -> None:
        away = f"http://127.0.0.1:{free_port()}"
        blind = pages("null")
        del blind["/v1/loads"]
        async with (
            ScriptedEngine({"/server_info": hang}) as hung,
            ScriptedEngine(blind) as unread,
            ScriptedEngine(pages("null")) as good,
        ):
            urls = [away, hung.url, unread.url, good.url]
            status, out, _ = await check(
                f"load: {{timeout: 2s}}\npools: [{{models: [m], workers: {{endpoints: {json.dumps(urls)}}}}}]",
                tmp_path,
            )

            assert status == 1
            assert [row_of(url, out)[-1] for url in urls] == ["refused", "timeout", "http_status", "ok"]
            assert "start the engine with --enable-metrics" in out
            assert out.endswith("3 of 4 engines cannot be used\n")

    asyncio.run(story())


def test_check_groups_engines_by_diagnostic(tmp_path: Path) -> None:
    """A diagnostic of several engines is printed once, with all of them."""

    async def story() -> None:
        async with (
            ScriptedEngine(pages("prefill", "0.5.23")) as prefill,
            ScriptedEngine(pages("decode", "0.5.9")) as first,
            ScriptedEngine(pages("decode", "0.5.9")) as second,
        ):
            prefill.pages = pages("prefill", "0.5.23", disaggregation_bootstrap_port=free_port())
            status, out, _ = await check(
                f'pools: [{{models: ["*"], prefill: {{endpoints: ["{prefill.url}"]}},'
                f' decode: {{endpoints: ["{first.url}", "{second.url}"]}}}}]',
                tmp_path,
            )

            assert status == 1, "no decode engine finds a prefill engine of so much a later release"
            assert "release is 0.5.23 on prefill and 0.5.9 on decode" in out
            assert f"decode_rank_not_controllable: {first.url}, {second.url}\n" in out
            assert f"bootstrap_unreachable: {prefill.url}\n" in out
            assert f"{first.url}, {second.url}: rank by the engine itself; paths: /generate, /v1/comp" in out
            ways = "routed_dp_rank in the body, and a room that agrees; prefill's rank by disagg_prefill_dp_rank"
            assert f"{prefill.url}: rank by {ways}; paths: /generate, " in out

    asyncio.run(story())


def test_check_finds_a_bootstrap_host_that_is_loopback(tmp_path: Path) -> None:
    """Decode engines on other machines cannot reach it."""

    async def story() -> None:
        async with ScriptedEngine(pages("prefill")) as prefill:
            status, out, _ = await check(
                f'pools: [{{models: ["*"], prefill: {{endpoints: ["{prefill.url}"]}},'
                f' decode: {{endpoints: ["http://decode.invalid:30000"]}}}}]',
                tmp_path,
            )

            assert status == 1
            assert f"bootstrap_host_is_loopback: {prefill.url}\n" in out

    asyncio.run(story())


def test_check_accepts_builds_from_source(tmp_path: Path) -> None:
    """A version without a release is reported; the engine is usable, as one of the newest release."""

    async def story() -> None:
        versions = ("0.0.0.dev0", "0.0.0.dev1+g0123abc", "main")
        async with AsyncExitStack() as stack:
            engines = [
                await stack.enter_async_context(ScriptedEngine(pages("null", version, ranks=1))) for version in versions
            ]
            urls = [engine.url for engine in engines]
            status, out, err = await check(
                f'pools: [{{models: ["*"], workers: {{endpoints: {json.dumps(urls)}}}}}]', tmp_path
            )

            assert (status, err) == (0, "")
            assert [row_of(url, out)[3] for url in urls] == ["unknown"] * 3
            assert f"unknown_version: {', '.join(urls)}\n" in out
            assert "its version names no release" in out
            assert out.endswith("3 engines can be used\n")

    asyncio.run(story())


def test_check_reports_impossible_numbers(tmp_path: Path) -> None:
    """The failure is that of the one engine."""

    async def story() -> None:
        impossible = {
            "/v1/loads": b'{"loads":[{"dp_rank":0,"num_used_tokens":1,"decode_moments":[5e-324,1,1e6,0,0,1]}]}',
            "/server_info": b'{"dp_size":1,"version":"0.5.23","chunked_prefill_size":1%b}' % (b"0" * 400),
        }
        async with AsyncExitStack() as stack:
            wrong = [
                await stack.enter_async_context(ScriptedEngine(pages("null", ranks=1) | {path: page}))
                for path, page in impossible.items()
            ]
            good = await stack.enter_async_context(ScriptedEngine(pages("null", ranks=1)))
            urls = [engine.url for engine in (*wrong, good)]
            status, out, err = await check(
                f'pools: [{{models: ["*"], workers: {{endpoints: {json.dumps(urls)}}}}}]', tmp_path
            )

            assert (status, err) == (1, "")
            assert [row_of(url, out)[-1] for url in urls] == ["wrong_shape", "wrong_shape", "ok"]
            assert f"{urls[0]}: /v1/loads says 5e-324 for the steps of decode_moments, which cannot be" in out
            assert f"{urls[1]}: /server_info" in out

    asyncio.run(story())


@needs_ipv6
def test_check_reports_a_scheduler_that_stands_still() -> None:
    """Its page answers, with numbers of a minute ago."""
    load = {"dp_rank": 0, "num_used_tokens": 0}

    async def story(seconds: float) -> list[str]:
        page = {"timestamp": "2026-01-01T12:00:00+00:00", "loads": [load | {"timestamp": 1767268800.0 - seconds}]}
        async with ScriptedEngine(pages("decode", ranks=1)) as engine:
            engine.pages["/v1/loads"] = json.dumps(page).encode()
            endpoint = Endpoint(engine.url, "127.0.0.1", engine.port, "*", Role.DECODE)
            (report,) = await check_engines([endpoint], LoadSettings())
            assert report.is_usable
            return [each.effect for each in report.diagnostics if each.code == "load_stands_still"]

    assert asyncio.run(story(2)) == []
    (effect,) = asyncio.run(story(60))
    assert "60 s old" in effect


def test_check_prints_ipv6_addresses_in_brackets(tmp_path: Path) -> None:
    """They are dialled without."""

    async def story() -> None:
        async with ScriptedEngine(host="::1") as prefill, ScriptedEngine(pages("decode"), host="::1") as decode:
            prefill.pages = pages("prefill", disaggregation_bootstrap_port=prefill.port)
            _, out, err = await check(
                f'pools: [{{models: ["*"], prefill: {{endpoints: ["{prefill.url}"]}},'
                f' decode: {{endpoints: ["{decode.url}"]}}}}]',
                tmp_path,
            )

            assert err == ""
            assert row_of(prefill.url, out)[5] == f"[::1]:{prefill.port}"
            assert "bootstrap_unreachable" not in out

    asyncio.run(story())


def test_check_reports_an_exception_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reports of other engines are complete."""
    sound = EnginePoller.round

    async def unsound(poller: EnginePoller) -> EngineFailure | None:
        if poller._endpoint.role is Role.PREFILL:
            raise ZeroDivisionError("float division by zero")
        return await sound(poller)

    async def story() -> None:
        async with ScriptedEngine(pages("decode")) as engine:
            both = [Endpoint(engine.url, "127.0.0.1", engine.port, "*", role) for role in (Role.PREFILL, Role.DECODE)]
            reports = await check_engines(both, LoadSettings())
            assert [report.state for report in reports] == ["internal", "ok"]

    monkeypatch.setattr(EnginePoller, "round", unsound)
    asyncio.run(story())


def test_check_prints_all_problems_of_a_file(tmp_path: Path) -> None:
    """They are on stderr, no engine is contacted, and the exit status is 2."""
    status, out, err = asyncio.run(check("load: {interval: 1}\npools: []\n", tmp_path))

    assert (status, out) == (2, "")
    assert "load.interval" in err
    assert "pools" in err


def test_check_finds_engines_that_cannot_be_paired(tmp_path: Path) -> None:
    """Each difference is printed with its engines. Only an engine without any partner is unusable."""

    async def story() -> None:
        async with (
            ScriptedEngine() as small,
            ScriptedEngine() as large,
            ScriptedEngine(pages("decode", page_size=1)) as decode,
            ScriptedEngine() as registry,
        ):
            for engine, size in ((small, 1), (large, 64)):
                engine.pages = pages("prefill", page_size=size, disaggregation_bootstrap_port=registry.port)
            config = (
                f'pools: [{{models: ["*"], prefill: {{endpoints: ["{small.url}", "{large.url}"]}},'
                f' decode: {{endpoints: ["{decode.url}"]}}}}]'
            )
            status, out, _ = await check(config, tmp_path)

            assert status == 1
            assert [row_of(each.url, out)[-1] for each in (small, large, decode)] == ["ok", "unusable", "ok"]
            assert f"page_size_differs: {large.url}\n" in out
            assert f"page_size_differs: {decode.url}\n" in out
            assert out.count("page_size is 64 on prefill and 1 on decode, so they are never paired: ") == 2
            assert out.count("no server of the pool is left that it can be paired with") == 1
            assert "remedy: start both with the same --page-size\n" in out
            assert out.endswith("1 of 3 engines cannot be used\n")

            large.pages = pages("prefill", page_size=1, disaggregation_bootstrap_port=registry.port)
            status, out, _ = await check(config, tmp_path)

            assert status == 0
            assert "page_size" not in out

    asyncio.run(story())


def test_check_prints_what_can_be_paired_with_what(tmp_path: Path) -> None:
    """There is a table if not all can. That groups differ is no problem of an engine that has a partner in its own."""

    async def story() -> None:
        async with AsyncExitStack() as running:
            registry, *engines = [await running.enter_async_context(ScriptedEngine()) for _ in range(5)]
            prefills, decodes = engines[:2], engines[2:]
            for number in range(2):
                prefills[number].pages = pages("prefill", page_size=1, disaggregation_bootstrap_port=registry.port)
                decodes[number].pages = pages("decode", page_size=1 + number)

            def config(second: str, decode: str) -> str:
                prefill = f'{{url: "{prefills[0].url}", group: v1}}, {{url: "{prefills[1].url}", group: {second}}}'
                others = f'{{url: "{decodes[0].url}", group: v1}}, {{url: "{decodes[1].url}", group: {decode}}}'
                return (
                    f"pools: [{{models: [m], prefill: {{endpoints: [{prefill}]}}, decode: {{endpoints: [{others}]}}}}]"
                )

            status, out, _ = await check(config("v1", "v2"), tmp_path)
            lines = out.splitlines()
            title = next(line for line in lines if line.startswith("pairs of m"))
            row = next(line for line in lines if line.startswith(f"{prefills[0].url}, {prefills[1].url} "))

            assert [row_of(each.url, out)[-1] for each in engines] == ["v1", "v1", "v1", "v2"]
            assert title.split() == ["pairs", "of", "m", decodes[0].url, decodes[1].url]
            assert row.rstrip().endswith("no: group v1, v2")
            assert " yes " in row
            assert status == 1
            assert "group_differs: " + decodes[1].url in out

            status, out, _ = await check(config("v2", "v2"), tmp_path)
            assert status == 1
            assert "page_size_differs: " in out
            assert "no: page_size 1, 2" in out

            decodes[1].pages = pages("decode", page_size=1)
            status, out, _ = await check(config("v2", "v2"), tmp_path)
            assert status == 0
            assert "differs: " not in out
            assert out.count("no: group") == 2

    asyncio.run(story())


def test_check_fails_for_a_role_without_endpoints(tmp_path: Path) -> None:
    """Every engine that is there can be used, and yet the pool cannot serve."""

    async def story() -> None:
        (tmp_path / "engines.yaml").write_text("[]")
        async with ScriptedEngine(pages("decode")) as decode:
            status, out, _ = await check(
                f"pools: [{{models: [m], prefill: {{file: {{path: {tmp_path}/engines.yaml}}}},"
                f' decode: {{endpoints: ["{decode.url}"]}}}}]',
                tmp_path,
            )

            assert status == 1
            assert out.endswith("1 engines can be used\npool m has no prefill endpoint and cannot serve\n")

    asyncio.run(story())


def test_check_waits_for_the_reason_of_a_source_that_fails(tmp_path: Path) -> None:
    """A DNS server that does not answer is contacted for five seconds."""

    async def story() -> None:
        with dns_server() as server:
            server.fault = "silent"
            dns = f"{{name: a.test, port: 1, nameserver: '127.0.0.1:{server.port}'}}"
            status, out, _ = await check(f"pools: [{{models: [m], workers: {{dns: {dns}}}}}]", tmp_path)

            assert status == 1
            assert out.endswith(" within 5 s\npool m has no worker endpoint and cannot serve\n")
            assert f"fails: a.test cannot be resolved: no answer of Do53:127.0.0.1@{server.port} within 5 s" in out

    asyncio.run(story())
