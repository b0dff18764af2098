"""``dp-extproc schema``: it accepts the files that the loader accepts, and refuses those that it refuses."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from config.test_loader import FULL, MISTAKES, POOL
from config.test_renamed import OLD_AND_NEW, PAIR
from config.test_template import whole_files
from config.test_variables import ENVIRONMENT, EQUAL
from dp_extproc.config import ConfigError, parse_config
from dp_extproc.config.json_schema import json_schema
from dp_extproc.config.template import template

ROOT = Path(__file__).parents[2]
SCHEMA = json_schema()
VALIDATOR = Draft202012Validator(SCHEMA)


def mistakes_in(text: str) -> list[str]:
    return [f"{'/'.join(map(str, each.absolute_path))}: {each.message}" for each in VALIDATOR.iter_errors(_data(text))]


def _data(text: str) -> Any:
    return yaml.safe_load(text)


def is_loaded(text: str) -> bool:
    try:
        parse_config(text, environment={**ENVIRONMENT, "POD_IP": "10.1.2.3"})
    except ConfigError:
        return False
    return True


def documented() -> Iterator[tuple[str, str]]:
    """Find whole configurations and single sections in the documentation, and whole ones in other directories."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for number, block in enumerate(blocks):
            if re.search(r"^(listen|envoy|pools|supervision|sync|load):", block, re.MULTILINE):
                yield f"{page.name}-{number}", block if "pools:" in block else f"{block}\n{POOL}"
    for path in (ROOT / "envoy/dp-extproc.yaml", *sorted((ROOT / "deploy/compose").rglob("*.yaml"))):
        yield f"{path.parent.name}-{path.name}", path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "deploy/manifests").glob("*.yaml")):
        for each in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if each["kind"] == "ConfigMap":
                yield path.name, each["data"]["dp-extproc.yaml"]


VALID = {
    "full": FULL,
    "template": template(),
    **{f"template-{name}": text for name, text in whole_files().items()},
    **{f"variables-{name}": text for name, (text, _) in EQUAL.items()},
    **{f"old-{name}": f"{PAIR}{old}\n" for name, (old, _, _) in OLD_AND_NEW.items()},
    **{f"new-{name}": f"{PAIR}{new}\n" for name, (_, new, _) in OLD_AND_NEW.items()},
    **{f"supervision-{text}": f"{POOL}supervision: {text}\n" for text in ("off", "'off'", "legs", "{mode: off}")},
    "nulls": POOL + "  prefill: null\n  decode: null\nsync: null\nqueue: null\nadmission: {max_token_ratio: null}\n",
    "ipv6": POOL.replace("//a:1", "//[::1]:1") + "listen: {grpc: '[::1]:1', admin: '::1:2'}\n",
    "address as a mapping": POOL + "listen: {grpc: {host: 127.0.0.1, port: 1}}\n",
    "sources": POOL.replace("endpoints:", "dns: [{name: a, port: 1}, {name: b, port: 2}], file: {path: c}, endpoints:"),
    "mixed sources": POOL.replace("['http://a:1']", "[{url: 'http://a:1'}], kubernetes: {pods: a=b}"),
    "bus": POOL + "sync: {url: 'rediss://:secret@a/1?ssl_ca_certs=/b'}\n",
    "socket": POOL + "sync: {url: 'unix:///run/dp-extproc'}\n",
    "units": POOL + "load: {interval: 1.5s, stale_after: 2m, timeout: 50ms, max_page_bytes: 2GiB}\ndrain: 1h\n",
    **dict(documented()),
}  # fmt: skip


@pytest.mark.parametrize("text", VALID.values(), ids=VALID)
def test_valid_configuration_is_accepted_by_the_schema_and_the_loader(text: str) -> None:
    """An editor that marks a good line as wrong is switched off."""
    assert mistakes_in(text) == []
    assert is_loaded(text)


WRONG = {
    "unit of a duration": POOL + "drain: 5d\n",
    "no unit": POOL + "drain: 5\n",
    "duration of zero": POOL + "drain: 0.0s\n",
    "unit of a size": POOL + "envoy: {max_body_bytes: 64MB}\n",
    "small size": POOL + "envoy: {max_body_bytes: 512}\n",
    "size as text": POOL + "envoy: {max_body_bytes: '1024'}\n",
    "name as an address": POOL + "listen: {grpc: 'localhost:9002'}\n",
    "address without port": POOL + "listen: {grpc: 127.0.0.1}\n",
    "unknown key": POOL + "colour: red\n",
    "unknown key below": POOL + "  policy: {hosts: random}\n",
    "unknown word": POOL + "  policy: {host: best}\n",
    "unknown mode": POOL + "supervision: maybe\n",
    "workers and prefill": POOL + "  prefill: {endpoints: ['http://b:1']}\n",
    "workers and decode": POOL + "  decode: {endpoints: ['http://b:1']}\n",
    "prefill alone": POOL.replace("workers", "prefill"),
    "no role": "pools: [{models: ['*']}]\n",
    "no source": "pools: [{models: ['*'], workers: {}}]\n",
    "no name of a DNS source": "pools: [{models: ['*'], workers: {dns: {port: 1}}}]\n",
    "empty list of sources": "pools: [{models: ['*'], workers: {dns: []}}]\n",
    "two selections": "pools: [{models: ['*'], workers: {kubernetes: {service: a, pods: b=c}}}]\n",
    "no selection": "pools: [{models: ['*'], workers: {kubernetes: {port: http}}}]\n",
    "key from two places": POOL + "  api_key: {env: A, file: b}\n",
    "half a certificate": POOL + "envoy: {service_tls: {ca: a, name: b, cert: c}}\n",
    "URL with a path": POOL.replace("a:1", "a:1/v1"),
    "bus of another scheme": POOL + "sync: {url: 'http://a'}\n",
    "no bus": POOL + "sync: {channel: a}\n",
    "word for a number": POOL + "retry: {attempts: many}\n",
    "large number": POOL + "retry: {attempts: 11}\n",
    "session header": POOL + "envoy: {session_header: 'x session'}\n",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_wrong_configuration_is_refused_by_the_schema_and_the_loader(text: str) -> None:
    """The editor shows the mistake before the service does."""
    assert mistakes_in(text)
    assert not is_loaded(text)


NOT_EXPRESSED = {
    "repeated-key", "repeated-key-inside", "repeated-merge",
    "workers-without-ports", "workers-on-the-admin-port", "tls-on-one-side",
    "lockstep-without-its-estimate", "lockstep-said-but-without-its-estimate", "everything-repeated",
    "stale-before-the-next-scrape", "bootstrap-host-with-a-port", "bootstrap-host-in-brackets-that-is-none",
    "session-header-of-ours", "session-header-of-the-engines", "session-header-of-gateways",
    "session-header-with-a-secret", "session-header-that-frames", "session-header-that-routes",
    "self-signed-certificate-for-the-printed-envoy", "health-of-several-processes",
    "tls-for-some-engines", "engines-with-unknown-certificates", "credentials-for-all-origins",
    "envoy-without-the-client-certificate",
}  # fmt: skip
"""Mistakes that concern several keys, names that are taken, or YAML itself."""


def yaml_mistakes() -> Iterator[tuple[str, str]]:
    for name, (text, _) in MISTAKES.items():
        try:
            _data(text)
        except (yaml.YAMLError, ValueError, RecursionError, AttributeError):  # the last over an impossible date
            continue
        yield name, text


YAML_MISTAKES = dict(yaml_mistakes())


@pytest.mark.parametrize(("name", "text"), YAML_MISTAKES.items(), ids=YAML_MISTAKES)
def test_mistake_that_the_loader_reports_is_refused_if_a_schema_can(name: str, text: str) -> None:
    """The schema follows the loader: a mistake is in the list only if its rule cannot be expressed."""
    assert bool(mistakes_in(text)) == (name not in NOT_EXPRESSED)


def test_every_rule_that_cannot_be_expressed_has_a_mistake() -> None:
    """A name that fits no mistake would hide nothing, and mean nothing."""
    assert YAML_MISTAKES.keys() >= NOT_EXPRESSED


def test_schema_is_printed_with_its_dialect_and_identifier() -> None:
    """Editors need both, and the schema of the schema accepts it."""
    argv = [sys.executable, "-m", "dp_extproc", "schema"]
    printed = json.loads(subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout)

    assert printed == json.loads(json.dumps(SCHEMA))
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert printed["$id"].startswith("urn:dp-extproc:configuration:")
    Draft202012Validator.check_schema(printed)


def test_old_names_are_marked_as_deprecated() -> None:
    """An editor strikes them through, and shows the new name."""
    health = SCHEMA["properties"]["health"]

    assert health["deprecated"] is True
    assert health["description"] == "Old name of `outlier_detection`."
    assert SCHEMA["$defs"]["PoolConfig"]["properties"]["carrier"]["deprecated"] is True
