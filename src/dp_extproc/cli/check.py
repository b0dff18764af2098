"""``dp-extproc check``: check a configuration, then every engine it names, then an Envoy in front of them."""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dp_extproc.cli import start
from dp_extproc.cli.check_envoy import check_envoy
from dp_extproc.config import Config, ConfigError, LoadSource, Protocol
from dp_extproc.contract import RANK_HEADER
from dp_extproc.engines.adapter import adapter_of
from dp_extproc.engines.capabilities import Capabilities, RankControl
from dp_extproc.engines.compatibility import Difference, KindPair
from dp_extproc.engines.credentials import Credentials
from dp_extproc.engines.model import Diagnostic, EngineFacts, Role, in_url
from dp_extproc.envoy_check import UnreadableError
from dp_extproc.fleet.check import EngineReport, check_engines, compare_pool
from dp_extproc.fleet.discovery.roster import Roster
from dp_extproc.fleet.discovery.runner import first_reports
from dp_extproc.fleet.discovery.source import WHEN_EMPTY
from dp_extproc.fleet.discovery.sources import role_sources
from dp_extproc.request.path import Api
from dp_extproc.runtime.engine_tls import engine_context
from dp_extproc.runtime.secrets import external_problems, read_api_keys

_COLUMNS: Final = ("url", "role", "pool", "version", "ranks", "bootstrap", "load", "state")
_PAGE: Final = {LoadSource.LOADS: "/v1/loads", LoadSource.METRICS: "/metrics", None: "-"}
_SOURCE_SECONDS: Final = 12.0
"""Longest time in seconds that the first report of a source may take. By then a look-up without an answer has failed,
and so has a connection to the API server of Kubernetes, and the reason is known.
"""
_OF_GATEWAYS: Final = (
    "what the gateway needs for prefill and decode, which cannot be checked from here:",
    "  only decode servers are endpoints of its pool; a request without a pick ends the process of a prefill server",
    "  it fails closed (failureMode: FailClose, failure_mode_allow: false)",
    "  it sends response headers (response_header_mode: SEND), and its message_timeout is longer than picker.hold",
    "  it repeats requests after refused connections alone",
)
_SHOWN: Final = 3
"""Bounds the endpoints that a row or a column of the table of pairs names."""
_NO_WRAPPING: Final = 1000
"""Columns of the table if the output is no terminal. It is wide enough for one line per engine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    start.add_arguments(parser)
    envoy = parser.add_argument_group("an Envoy that another team configures; see docs/mesh.md")
    envoy.add_argument(
        "--envoy",
        nargs="+",
        metavar="URL|FILE",
        help="compare it with what the configuration needs: the URL of its admin address, or files with its "
        "/config_dump, its bootstrap, or parts of one",
    )
    envoy.add_argument("--no-engines", action="store_true", help="check the Envoy of --envoy alone")


def run(args: argparse.Namespace) -> int:
    """Check and print.

    Returns:
        The exit status: 0 if every engine and the Envoy can be used, 1 if one cannot, 2 if the configuration, what it
        names, or what ``--envoy`` names cannot be read.
    """
    if args.no_engines and not args.envoy:
        sys.stderr.write("--no-engines: nothing is left to check; add --envoy, or remove it\n")
        return 2
    try:
        started = start.load(args, lambda line: sys.stderr.write(f"{line}\n"))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    config = started.config
    if problems := external_problems(config):
        sys.stderr.write(f"{ConfigError(started.source.name, problems)}\n")
        return 2
    is_terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if is_terminal else _NO_WRAPPING, markup=False, highlight=False)
    is_usable = args.no_engines or _check_engines(console, config)
    if args.envoy:
        try:
            is_usable &= check_envoy(console, config.model_copy(update={"listen": started.listen}), args.envoy)
        except UnreadableError as error:
            sys.stderr.write(f"{error}\n")
            return 2
    return 0 if is_usable else 1


def _check_engines(console: Console, config: Config) -> bool:
    """Check every engine and print. Returns whether all can be used, and each pool has engines of all its roles."""
    roster, reports = asyncio.run(_check(config))
    all_report = _print_sources(console, roster)
    if reports:
        _print(console, reports)
    has_all_roles = _print_empty_roles(console, roster)
    if config.protocol is Protocol.ENDPOINT_PICKER and any(pool.is_disaggregated for pool in config.pools):
        for line in _OF_GATEWAYS:
            console.print(Text(line), soft_wrap=True)
    return all_report and has_all_roles and all(report.is_usable for report in reports)


async def _check(config: Config) -> tuple[Roster, list[EngineReport]]:
    roster = await first_reports(role_sources(config), _SOURCE_SECONDS)
    keys = Credentials(read_api_keys(config).by_pool)
    return roster, await check_engines(roster.endpoints, config.load, keys, engine_context(config.engine_tls))


def _print_sources(console: Console, roster: Roster) -> bool:
    """Print what each source reports, except the configuration itself. Returns whether each has reported."""
    all_report = True
    for key, source in roster.sources.items():
        report = roster.reports[key]
        if source.source is None:
            continue
        states = Counter(member.state.value for member in report.members or ())
        if report.failure is not None:
            found, style = f"fails: {report.failure}", "red"
        elif report.members is None:
            found, style = f"no report within {_SOURCE_SECONDS:g} s", "red"
        else:
            found = ", ".join(f"{count} {state}" for state, count in states.items())
            found = found or f"no members; {WHEN_EMPTY[source.kind]}"
            style = "green" if states else "yellow"
        all_report = all_report and report.failure is None and report.members is not None
        place = f"pool {source.place.pool}, {source.place.role}"
        console.print(Text(f"{source.name} ({place}): {found}", style=style), soft_wrap=True)
    for url, first, other in sorted(roster.duplicates):
        console.print(Text(f"{url} is listed by {first} and by {other}; the first one counts"), soft_wrap=True)
    return all_report


def _print_empty_roles(console: Console, roster: Roster) -> bool:
    """Print which pools cannot serve because a role has no endpoint. Returns whether all can."""
    places = dict.fromkeys((source.place.pool, source.place.role) for source in roster.sources.values())
    empty = places.keys() - {(endpoint.pool, endpoint.role) for endpoint in roster.endpoints}
    for pool, role in sorted(empty):
        console.print(Text(f"pool {pool} has no {role} endpoint and cannot serve", style="red"), soft_wrap=True)
    return not empty


def _print(console: Console, reports: Sequence[EngineReport]) -> None:
    line = partial(console.print, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    has_groups = any(report.endpoint.group for report in reports)
    for column in (*_COLUMNS, *(["group"] if has_groups else [])):
        table.add_column(column, justify="right" if column == "ranks" else "left", overflow="fold")
    for report in reports:
        table.add_row(*_row(report), *([Text(report.endpoint.group or "-")] if has_groups else []))
    console.print(table)
    console.print()
    for report in reports:
        if report.failure is not None:
            line(Text(f"{report.endpoint.url}: {report.failure.message}"))
    for way, urls in _by_way(reports):
        line(Text(f"{', '.join(urls)}: {way}"))
    for diagnostic, urls in _by_diagnostic(reports):
        line(Text(f"{diagnostic.code}: {', '.join(urls)}", style="red" if diagnostic.unusable else "yellow"))
        line(Text(f"  what happens: {diagnostic.effect}"))
        line(Text(f"  remedy: {diagnostic.remedy}"))
    for pool in dict.fromkeys(report.endpoint.pool for report in reports):
        _print_pairs(console, pool, compare_pool(reports, pool))
    if unusable := sum(not report.is_usable for report in reports):
        console.print(Text(f"{unusable} of {len(reports)} engines cannot be used", style="red"))
    else:
        console.print(Text(f"{len(reports)} engines can be used", style="green"))


def _print_pairs(console: Console, pool: str, pairs: Sequence[KindPair]) -> None:
    """Print which endpoints can be paired with which, if not all with all."""
    if all(pair.difference is None for pair in pairs):
        return
    columns = dict.fromkeys(pair.decodes for pair in pairs)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in (f"pairs of {pool}", *map(_names, columns)):
        table.add_column(Text(title), overflow="fold")
    for prefills in dict.fromkeys(pair.prefills for pair in pairs):
        found = {pair.decodes: pair.difference for pair in pairs if pair.prefills == prefills}
        table.add_row(Text(_names(prefills)), *(_verdict(found[column]) for column in columns))
    console.print(table)
    console.print()


def _names(urls: Sequence[str]) -> str:
    """Name some endpoints, of a large fleet only the first ones."""
    more = f" and {len(urls) - _SHOWN} more" if len(urls) > _SHOWN else ""
    return ", ".join(urls[:_SHOWN]) + more


def _verdict(difference: Difference | None) -> Text:
    if difference is None:
        return Text("yes", style="green")
    return Text(f"no: {difference.name} {difference.prefill}, {difference.decode}", style="yellow")


def _row(report: EngineReport) -> Iterable[Text]:
    endpoint, facts, bootstrap = report.endpoint, report.facts, report.bootstrap
    cells = (
        endpoint.url,
        endpoint.role.value,
        endpoint.pool,
        "-" if facts is None else adapter_of(facts.kind).release(facts),
        "-" if facts is None else str(facts.dp_ranks),
        "-" if bootstrap is None else f"{in_url(bootstrap[0])}:{bootstrap[1]}",
        _PAGE[report.source],
    )
    yield from map(Text, cells)
    yield Text(report.state, style="green" if report.state == "ok" else "yellow" if report.is_usable else "red")


def _by_way(reports: Iterable[EngineReport]) -> list[tuple[str, list[str]]]:
    """Group endpoints by the way in which requests reach their ranks."""
    found: dict[str, list[str]] = {}
    for report in reports:
        if report.facts is not None:
            endpoint = report.endpoint
            takes = adapter_of(report.facts.kind).capabilities(report.facts)
            way = _way_to_ranks(takes, endpoint.role, report.facts, headers_only=endpoint.headers_only)
            found.setdefault(way, []).append(endpoint.url)
    return list(found.items())


def _way_to_ranks(takes: Capabilities, role: Role, facts: EngineFacts, *, headers_only: bool) -> str:
    """Describe in one line how requests reach the ranks of an engine."""
    if headers_only:
        paths = ", ".join(sorted(takes.overrides_on)) or "none"
        return f"rank, room and prefill's rank by x-override-* headers alone; paths: {paths}"
    if facts.single_rank is not None:
        ways = f"rank {facts.single_rank[0]} of {facts.single_rank[1]} by its address"
    elif facts.dp_ranks == 1:
        ways = "one rank"
    elif role is Role.WORKER:
        keys = {key: [api for api in Api if takes.rank_keys.get(api) == key] for key in takes.rank_keys.values()}
        names = [f"{key} ({', '.join(apis)})" for key, apis in keys.items()]
        if takes.rank_header_on:
            names.append(f"the header {RANK_HEADER} ({', '.join(sorted(takes.rank_header_on))})")
        ways = f"rank by {'; '.join(names)}" if names else "rank by the engine itself"
    else:
        control = RankControl.BY_FIELD if takes.takes_routed_rank else RankControl.BY_ROOM
        ways = f"rank by {(control if role is Role.PREFILL else takes.decode_control).value}"
        if takes.only_first_prefill_rank:
            ways = "rank 0 only"
        elif role is Role.PREFILL and takes.takes_routed_rank:
            ways += ", and a room that agrees"
    if role is Role.WORKER:
        return ways
    if takes.overrides_on:
        ways += f"; by x-override-* headers where nothing is streamed ({', '.join(sorted(takes.overrides_on))})"
    prefill = "; prefill's rank by disagg_prefill_dp_rank" if takes.takes_prefill_rank else ""
    return f"{ways}{prefill}; paths: {', '.join(api for api in Api if takes.serves(api)) or 'none'}"


def _by_diagnostic(reports: Iterable[EngineReport]) -> list[tuple[Diagnostic, list[str]]]:
    """Group endpoints by diagnostic, those that make an engine unusable first."""
    found: dict[Diagnostic, list[str]] = {}
    for report in reports:
        for diagnostic in report.diagnostics:
            found.setdefault(diagnostic, []).append(report.endpoint.url)
    return sorted(found.items(), key=lambda item: not item[0].unusable)
