"""``dp-extproc init``: a file with every key, which works as it is."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dp_extproc.config import parse_config
from dp_extproc.config.keys import describe, mapping_in, sections
from dp_extproc.config.template import template

MINIMAL = (
    "pools: [{models: ['*'], prefill: {endpoints: ['http://127.0.0.1:31001']}, "
    "decode: {endpoints: ['http://127.0.0.1:32001']}}]"
)
ALTERNATIVES = {
    "first": ("workers", "selector", "pods", "inference_pool", "api_key/file", "engine_tls"),
    "second": ("prefill", "decode", "api_key/env", "envoy/engine_tls/sds"),
    "third": (
        *("workers", "service", "pods", "inference_pool", "api_key/env"),
        *("envoy/engine_tls/ca", "engine_tls/cert", "engine_tls/key"),
    ),
    "fourth": ("workers", "service", "selector", "inference_pool", "api_key/env", "engine_tls"),
    "fifth": ("workers", "service", "selector", "pods", "kubernetes/port", "api_key/env", "engine_tls"),
}
"""Keys that are left out for others that exclude them. Every key stays in one of the files."""
KEYS = {(section, key) for section in sections() for key in section.model_fields}


def without(node: Any, names: tuple[str, ...], at: str = "") -> Any:
    """Copy YAML data without some keys, each of which may be written with its parents."""
    if isinstance(node, list):
        return [without(each, names, at) for each in node]
    if not isinstance(node, dict):
        return node
    left_out = tuple(f"/{name}" for name in names)
    kept = {key: value for key, value in node.items() if not f"{at}/{key}".endswith(left_out)}
    return {key: without(value, names, f"{at}/{key}") for key, value in kept.items()}


def with_every_key() -> dict[str, Any]:
    """Return the data of the file after each marker before a key was removed."""
    data: dict[str, Any] = yaml.safe_load(re.sub(r"^( *)#(?=[^ #\n])", r"\1", template(), flags=re.MULTILINE))
    return data


def whole_files() -> Mapping[str, str]:
    """Return files that have every key of the template, but for alternatives."""
    data = with_every_key()
    texts = {name: yaml.safe_dump(without(deepcopy(data), names)) for name, names in ALTERNATIVES.items()}
    return {name: text.replace("http://", "https://") if "engine_tls" in text else text for name, text in texts.items()}


def keys_of(node: Any, section: Any) -> Iterator[tuple[Any, str]]:
    """Find the keys in YAML data, each with its section."""
    if isinstance(node, list):
        for each in node:
            yield from keys_of(each, section)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield section, key
            yield from keys_of(value, mapping_in(section.model_fields[key].annotation))


def test_template_is_the_smallest_configuration_with_its_defaults() -> None:
    """Whoever starts with it gets what the documentation describes."""
    assert parse_config(template()) == parse_config(MINIMAL)


def test_template_has_every_key() -> None:
    """A key that is not in the file is not found."""
    assert set(keys_of(with_every_key(), next(sections()))) == KEYS


@pytest.mark.parametrize(("name", "text"), whole_files().items(), ids=ALTERNATIVES)
def test_every_key_of_the_template_is_valid_without_its_marker(name: str, text: str) -> None:
    """Examples of keys that are not in use can be used."""
    config = parse_config(text)

    assert config.sync is not None
    assert config.listen.tls is not None
    assert (config.pools[0].workers is None) == (name != "second")


@pytest.mark.parametrize(
    ("section", "key"), [(section.__name__, key) for section, key in sorted(KEYS, key=str)], ids="/".join
)
def test_every_key_is_described(section: str, key: str) -> None:
    """The template and the schema show the description, in words of the file."""
    (field,) = [owner.model_fields[key] for owner in sections() if owner.__name__ == section]
    text = describe(field)

    assert re.match(r"[`A-Z].*\.`?$", text.partition("\n")[0])
    assert "``" not in text
    assert "None" not in text


def _init(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "dp_extproc", "init", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_init_writes_a_new_file_and_never_another_one(tmp_path: Path) -> None:
    """Without a name the text is printed; a file that exists may be the work of hours."""
    path = tmp_path / "dp-extproc.yaml"
    written, again, nowhere = _init(str(path)), _init(str(path)), _init(str(tmp_path / "no" / "file"))

    assert (written.returncode, written.stdout, path.read_text()) == (0, "", template())
    assert written.stderr == f"{path} is written; put the engines into it, then run: dp-extproc check -c {path}\n"
    assert (again.returncode, nowhere.returncode) == (1, 1)
    assert again.stderr == f"{path} exists, and stays as it is; name another file, or remove this one\n"
    assert "cannot be written: No such file or directory" in nowhere.stderr
    assert _init().stdout == template()
