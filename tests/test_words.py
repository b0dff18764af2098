"""The product and its documentation use the words of ``docs/glossary.md``, and not those that the glossary replaces.

The tests check identifiers, docstrings, comments and log texts of the product, and all Markdown pages. They skip code
in backticks and in code blocks of prose, because names are checked where they are defined. The command ``python
tests/test_words.py`` prints the number of hits by room, and with ``--all`` each hit.

Some replaced words also have a common meaning, so they are not checked: share, weigh, held, release, place, choose,
decide, route, line, join, side, group, others, exchange, link, pace, happen, note, watch, call, show.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = "src/dp_extproc/"


class Place(StrEnum):
    """Kinds of text that are checked apart."""

    NAME = "name"
    DOCSTRING = "docstring"
    COMMENT = "comment"
    LOG = "log text"
    PAGE = "page"


EVERYWHERE = frozenset(Place)
PROSE = EVERYWHERE - {Place.NAME}
TEXTS = PROSE - {Place.LOG}

REPLACED = (
    # word of the glossary, replaced forms (blanks stand for underscores in names), places
    ("engine, endpoint", "server servers host hosts", EVERYWHERE),
    ("worker process", "seat seats", EVERYWHERE),
    ("worker process, aggregated endpoint", r"workers?(?!\ process)", TEXTS),
    ("rank", "slot slots", EVERYWHERE),
    ("reservation", "books", EVERYWHERE),
    ("in-flight tracker", "ledger ledgers", EVERYWHERE),
    ("decision, schedule", "dispatch dispatches dispatched dispatching dispatcher", EVERYWHERE),
    ("cancel", "withdraw withdraws withdrew withdrawn withdrawing withdrawal", EVERYWHERE),
    ("expire", r"(?:write|writes|wrote|written)\ off", EVERYWHERE),
    ("external", "stranger strangers", EVERYWHERE),
    ("peer, untrusted, external", "foreign", EVERYWHERE),
    ("report", "tell tells told telling say says said saying", EVERYWHERE),
    ("has, counts, reads", "know knows knew", EVERYWHERE),
    ("sample trust", "belief beliefs believe believes believed believing", EVERYWHERE),
    ("keep, end an ejection", "forgive forgives forgave forgiven forgiving", EVERYWHERE),
    ("no client, no process, a program", "nobody somebody", EVERYWHERE),
    ("capabilities", "recipe recipes", EVERYWHERE),
    ("diagnostic", "trap traps pitfall pitfalls", EVERYWHERE),
    ("failure kind", "trouble troubles", EVERYWHERE),
    ("unhealthy", "sick", EVERYWHERE),
    ("recovered", r"(?:come|comes|came)\ back", EVERYWHERE),
    ("stale", "demote demotes demoted demoting", EVERYWHERE),
    ("draining", "leaving", EVERYWHERE),
    ("held, commit", r"lets?\ go (?:open|opens|opened)\ (?:the\ )?gate", EVERYWHERE),
    ("admission queue", r"waiting\ line in\ line", EVERYWHERE),
    ("routing fields, leg encoding", "carriage carriages carrier carriers", EVERYWHERE),
    ("request context", "circumstance circumstances", EVERYWHERE),
    ("request cost", "demand", EVERYWHERE),
    ("listener", "observer observers", EVERYWHERE),
    ("model registry", "catalogue catalogues", EVERYWHERE),
    ("peer timeout", "silence silenced", EVERYWHERE),
)

ALLOWED_PHRASES = (
    # a phrase with a replaced word, where it may stand (a prefix of the path), why
    (r"server process(?:es)?", "", "the definition of an engine"),
    (r"(?:gRPC|HTTP|API|ext_proc|empty|Redis|Valkey|DNS|bootstrap|admin|uvicorn) servers?", "", "not an engine"),
    (r"servers?", f"{PRODUCT}sync/transport/redis_bus.py", "of Redis"),
    (r"(?:no |the )?workers? of a LeaderWorkerSet", "", "a pod of Kubernetes"),
    (r"servers?", f"{PRODUCT}lab/testbed/loopback.py", "any HTTP server of a test"),
    (r"servers?", f"{PRODUCT}lab/engine/listener.py", "of uvicorn"),
    (r"server-sent events?|a server that speaks TLS", "", "words of HTTP and TLS"),
    (r"worker threads?", f"{PRODUCT}lab/testbed/envoy.py", "Envoy's word"),
    (r"host", f"{PRODUCT}lab/testbed/", "a parameter that is an address to listen on"),
    (r"host", f"{PRODUCT}runtime/sockets.py", "the name of this machine"),
    (r"(?:host|bootstrap host) (?:names?|and port|or port|header)|bootstrap host", "", "a part of an address"),
    (r"host polic(?:y|ies)", "", "the key policy.host"),
    (r"virtual hosts?", "", "Envoy's word"),
    (r"the host in", "docs/", "a part of a URL"),
    (r"(?:on|of) the host", "docs/compose.md", "the machine that runs containers"),
    (r"no host or storage tier", "docs/engine.md", "SGLang's word for a tier of memory"),
    (r"host names", "docs/engines.md", "a part of an address"),
    (r"hosts?", f"{PRODUCT}config/", "a machine, or a part of an address"),
    (r"dead host", f"{PRODUCT}envoy_config/", "a machine"),
    (r"Envoy must know them all", f"{PRODUCT}cli/start.py", "an established message, which alerts may match"),
    (r"no servers differ", f"{PRODUCT}observability/log.py", "an established message, which alerts may match"),
    (r"on their books", f"{PRODUCT}sync/transport/replica.py", "an established message, which alerts may match"),
    (r"on demand", "", "an idiom"),
)
ALLOWED_NAMES = {
    "__slots__": "Python's",
    "slots": "a parameter of dataclasses",
    "server": "grpc.aio.server; a parameter of uvicorn",
    "Server": "uvicorn.Server",
    "AdminServer": "an HTTP server",
    "ServerTls": "settings of the gRPC server, the key listen.tls",
    "PROTOCOL_TLS_SERVER": "a constant of ssl",
    "ssl_server_certificate_configuration": "a function of gRPC",
    "dynamic_ssl_server_credentials": "a function of gRPC",
    "ServerCredentials": "a class of gRPC",
    "server_credentials": "an object of gRPC",
    "add_HealthServicer_to_server": "a function of gRPC",
    "create_server": "a function of asyncio",
    "start_server": "a function of asyncio",
    "start_unix_server": "a function of asyncio",
    "server_hostname": "a parameter of asyncio",
    "ServerDisconnectedError": "an exception of aiohttp",
    "host": "a part of a URL or of a socket's address; the key policy.host",
    "DECODE_HOST": "the header x-dp-decode-host",
    "PREFILL_HOST": "the header x-dp-prefill-host",
    "META_DECODE_HOST": "a key of Envoy's metadata",
    "META_PREFILL_HOST": "a key of Envoy's metadata",
    "disable_shadow_host_suffix_append": "Envoy's",
    "host_selection_retry_max_attempts": "Envoy's",
    "RetryPolicyRetryHostPredicate": "Envoy's",
    "PreviousHostsPredicate": "Envoy's",
    "previous_hosts": "Envoy's",
    "retry_host_predicate": "Envoy's",
    "server_listener_name": "Envoy's",
}
"""Names that libraries, Envoy, SGLang or the configuration give, and why they stay."""
ALLOWED_IN_NAMES = (
    # words of a name, where (a prefix of the path), why
    (r"server info", "", "SGLang's page /server_info"),
    (r"tls server name", f"{PRODUCT}fleet/discovery/kubernetes/", "keys of a kubeconfig"),
    (r"worker index", f"{PRODUCT}fleet/discovery/kubernetes/", "a label of LeaderWorkerSet"),
    (r"bootstrap (?:hosts?|servers?)", "", "SGLang's words"),
    (r"virtual hosts?", "", "Envoy's word"),
    (r"grpc servers?", "", "not an engine"),
    (r"host (?:policy|and port)", "", "the key policy.host; a part of an address"),
    (r"dispatch", f"{PRODUCT}envoy_config/", "the listener and cluster dp_dispatch"),
    (r"dispatch", f"{PRODUCT}envoy_check/", "the listener and cluster dp_dispatch"),
    (r"decode server", f"{PRODUCT}envoy_config/", "the cluster decode_server"),
    (r"decode server", f"{PRODUCT}envoy_check/", "the cluster decode_server"),
    (
        r"hosts?",
        f"{PRODUCT}envoy_config/",
        "values of the headers x-dp-decode-host and x-dp-prefill-host; Envoy's words",
    ),
    (r"hosts?", f"{PRODUCT}config/", "a part of an address; the key policy.host"),
    (r"host", f"{PRODUCT}lab/engine/", "an address to listen on; SGLang's bootstrap_host"),
    (r"host", f"{PRODUCT}runtime/container_health.py", "a part of an address"),
    (r"host", f"{PRODUCT}scheduling/policies.py", "the key policy.host"),
    (r"host", f"{PRODUCT}lab/simulate/command.py", "the key policy.host"),
    (r"servers?", f"{PRODUCT}lab/engine/listener.py", "of uvicorn"),
    (r"servers?", f"{PRODUCT}lab/engine/bootstrap_server.py", "SGLang's word"),
    (r"server times", f"{PRODUCT}lab/engine/", "times that SGLang calls so"),
    (r"dispatch(?:er|ed)?", f"{PRODUCT}lab/engine/", "SGLang's word for the choice of a rank"),
)


@dataclass(frozen=True, slots=True)
class Hit:
    """A replaced word."""

    path: str
    line: int
    place: Place
    word: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.place}: {self.word!r}; the glossary has: {self.instead}"


def _pattern(place: Place) -> re.Pattern[str]:
    forms = [(form.replace("\\ ", " "), instead) for instead, forms, places in REPLACED if place in places
             for form in re.split(r"(?<!\\) ", forms)]  # fmt: skip
    return re.compile(r"\b(?:" + "|".join(form for form, _ in forms) + r")\b", re.IGNORECASE)


PATTERNS = {place: _pattern(place) for place in Place}


def _instead(word: str, place: Place) -> str:
    return next(
        instead
        for instead, forms, places in REPLACED
        if place in places
        and any(re.fullmatch(form.replace("\\ ", " "), word, re.IGNORECASE) for form in re.split(r"(?<!\\) ", forms))
    )


def words_of(name: str) -> str:
    """Split a name into lower-case words: ``HostLoad`` and ``host_load`` both give ``host load``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", name).lower().strip()


def _without(path: str, text: str, allowed: tuple[tuple[str, str, str], ...]) -> str:
    for phrase, prefix, _ in allowed:
        if path.startswith(prefix):
            text = re.sub(rf"\b(?:{phrase})\b", "", text, flags=re.IGNORECASE)
    return text


def hits_in(path: str, line: int, place: Place, text: str) -> Iterator[Hit]:
    """Find the replaced words of one text."""
    if place is Place.NAME:
        if text in ALLOWED_NAMES:
            return
        text = _without(path, words_of(text), ALLOWED_IN_NAMES)
    else:
        text = " ".join(re.sub(r"``.*?``|`[^`]*`", "", text, flags=re.DOTALL).split())
        text = _without(path, text, ALLOWED_PHRASES)
    for found in PATTERNS[place].finditer(text):
        yield Hit(path, line, place, found[0], _instead(found[0], place))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _log_text(node: ast.Call) -> str:
    """Give the constant parts of a message that is logged."""
    if not (
        isinstance(node.func, ast.Attribute)
        and node.func.attr in {"debug", "info", "warning", "error", "exception", "critical"}
        and "log" in ast.unparse(node.func.value).lower()
    ):
        return ""
    parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return " ".join(parts)


def hits_of_module(path: str) -> Iterator[Hit]:
    """Find the replaced words of a module."""
    source = (ROOT / path).read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in {tokenize.NAME, tokenize.COMMENT}:
            place = Place.NAME if token.type == tokenize.NAME else Place.COMMENT
            yield from hits_in(path, token.start[0], place, token.string)
    for node in ast.walk(ast.parse(source)):
        if _is_text(node):
            yield from hits_in(path, node.lineno, Place.DOCSTRING, node.value.value)  # type: ignore[attr-defined]
        elif isinstance(node, ast.Call):
            yield from hits_in(path, node.lineno, Place.LOG, _log_text(node))


def hits_of_page(path: str) -> Iterator[Hit]:
    """Find the replaced words of a Markdown page, but for code and the targets of links."""
    text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"^(```|~~~).*?^\1", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for paragraph in re.finditer(r"(?:.+\n?)+", text):
        yield from hits_in(path, text.count("\n", 0, paragraph.start()) + 1, Place.PAGE, paragraph[0])


def listed(*patterns: str) -> list[str]:
    """List the files of this project, by patterns of git."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted({path for path in found.stdout.splitlines() if (ROOT / path).is_file()})


MODULES = listed(f"{PRODUCT}*.py")
PAGES = listed("*.md")


@pytest.mark.parametrize("path", MODULES)
def test_words_of_a_module_are_those_of_the_glossary(path: str) -> None:
    """A second word for one concept makes a reader look for a difference that does not exist."""
    assert [str(hit) for hit in hits_of_module(path)] == []


@pytest.mark.parametrize("path", PAGES)
def test_words_of_a_page_are_those_of_the_glossary(path: str) -> None:
    """An operator searches the log for the words of the documentation."""
    assert [str(hit) for hit in hits_of_page(path)] == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place.NAME, "HostLoad"),
        (Place.NAME, "held_on_servers"),
        (Place.NAME, "written_off"),
        (Place.DOCSTRING, "Nobody is told."),
        (Place.COMMENT, "# the engine came\n# back"),
        (Place.LOG, "the worker %s is in trouble"),
        (Place.PAGE, "A worker places it."),
    ],
)
def test_a_replaced_word_is_found_in_each_place(place: Place, text: str) -> None:
    """The patterns would pass every text if they matched none."""
    assert list(hits_in("", 1, place, text.replace("# ", "")))


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place.NAME, "serve"),
        (Place.NAME, "read_server_info"),
        (Place.DOCSTRING, "Read ``/server_info`` of a gRPC server in a server process."),
        (Place.PAGE, "Each worker process uses `host: lockstep`."),
    ],
)
def test_words_with_another_meaning_are_allowed(place: Place, text: str) -> None:
    """Envoy, SGLang and libraries have words of their own."""
    assert list(hits_in("", 1, place, text)) == []


def main() -> None:
    """Print the number of hits by room and place, and with ``--all`` each hit."""
    hits = [hit for path in MODULES for hit in hits_of_module(path)]
    hits += [hit for path in PAGES for hit in hits_of_page(path)]
    by_room: dict[str, Counter[Place]] = {}
    for hit in hits:
        parts = hit.path.removeprefix(PRODUCT).split("/")
        room = hit.path if hit.path.endswith(".md") else parts[0]
        by_room.setdefault(room, Counter())[hit.place] += 1
    for room, counts in sorted(by_room.items()):
        sys.stdout.write(f"{room}: {counts.total()} ({', '.join(f'{place} {n}' for place, n in counts.items())})\n")
    if "--all" in sys.argv:
        sys.stdout.writelines(f"{hit}\n" for hit in hits)


if __name__ == "__main__":
    main()
