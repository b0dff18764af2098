"""Old names of keys and values are read, each with one warning, and replaced before anything is checked."""

from pathlib import Path

import pytest

from dp_extproc.config import ConfigError, Problem, parse_config
from dp_extproc.config.renamed import KEYS, VALUES

POOL = "pools:\n- models: ['*']\n  workers: {endpoints: ['http://a:1']}\n"
PAIR = "pools:\n- models: ['*']\n  prefill: {endpoints: ['http://a:1']}\n  decode: {endpoints: ['http://b:1']}\n"


def no_warning(warning: Problem) -> None:
    pytest.fail(str(warning))


OLD_AND_NEW: dict[str, tuple[str, str, list[str]]] = {
    "health": ("health: {}", "outlier_detection: {}", ["outlier_detection"]),
    "outlier_detection.failures": (
        "health: {failures: 5}",
        "outlier_detection: {consecutive_failures: 5}",
        ["outlier_detection", "consecutive_failures"],
    ),
    "outlier_detection.ejection": (
        "outlier_detection: {ejection: 2s}",
        "outlier_detection: {base_ejection_time: 2s}",
        ["base_ejection_time"],
    ),
    "outlier_detection.max_ejection": (
        "outlier_detection: {max_ejection: 2s}",
        "outlier_detection: {max_ejection_time: 2s}",
        ["max_ejection_time"],
    ),
    "envoy.headers_timeout": (
        "envoy: {headers_timeout: 2s}",
        "envoy: {request_headers_timeout: 2s}",
        ["request_headers_timeout"],
    ),
    "envoy.upload_timeout": ("envoy: {upload_timeout: 2s}", "envoy: {request_timeout: 2s}", ["request_timeout"]),
    "envoy.cut_streams": (
        "envoy: {cut_streams: cut}",
        "envoy: {truncated_streams: reset}",
        ["truncated_streams: reset"],
    ),
    "pools.carrier": ("  carrier: headers", "  routing_fields: headers", ["routing_fields"]),
    "admission.max_fill": ("admission: {max_fill: 2}", "admission: {max_token_ratio: 2}", ["max_token_ratio"]),
    "admission.max_load": (
        "admission: {max_load: null}",
        "admission: {max_request_ratio: null}",
        ["max_request_ratio"],
    ),
    "load.prefill_step_tokens": (
        "load: {prefill_step_tokens: 2}",
        "load: {prefill_step_cost_tokens: 2}",
        ["prefill_step_cost_tokens"],
    ),
    "load.decode_request_tokens": (
        "load: {decode_request_tokens: 2}",
        "load: {decode_request_cost_tokens: 2}",
        ["decode_request_cost_tokens"],
    ),
    "sync.silence": (
        "sync: {url: 'redis://a', silence: 5s}",
        "sync: {url: 'redis://a', peer_timeout: 5s}",
        ["peer_timeout"],
    ),
    "protocol=own": ("protocol: own", "protocol: envoy", ["protocol: envoy"]),
    "supervision=answers": ("supervision: answers", "supervision: first_event", ["supervision: first_event"]),
    "supervision.mode=answers": (
        "supervision: {mode: answers}",
        "supervision: {mode: first_event}",
        ["mode: first_event"],
    ),
    "envoy.body_mode=duplex": (
        "envoy: {body_mode: duplex}",
        "envoy: {body_mode: full_duplex_streamed}",
        ["body_mode: full_duplex_streamed"],
    ),
    "envoy.truncated_streams=cut": (
        "envoy: {truncated_streams: cut}",
        "envoy: {truncated_streams: reset}",
        ["truncated_streams: reset"],
    ),
    "envoy.truncated_streams=event": (
        "envoy: {cut_streams: event}",
        "envoy: {truncated_streams: error_event}",
        ["truncated_streams: error_event"],
    ),
}
"""By the renamed key, or key and value: a file with the old name, the same with the new one, and what to write."""


def test_every_renamed_key_and_value_has_a_case() -> None:
    """A name that is renamed later needs a case too."""
    values = {f"{key}={value}" for key, renamed in VALUES.items() for value in renamed}
    assert OLD_AND_NEW.keys() == {*KEYS, *values}


@pytest.mark.parametrize(("old", "new", "remedies"), OLD_AND_NEW.values(), ids=OLD_AND_NEW)
def test_old_name_is_read_with_one_warning(old: str, new: str, remedies: list[str]) -> None:
    """The file means the same as with the new name. The warning has the line and the new name."""
    warnings: list[Problem] = []

    assert parse_config(f"{PAIR}{old}\n", warn=warnings.append) == parse_config(f"{PAIR}{new}\n", warn=no_warning)

    assert [(warning.line, warning.message) for warning in warnings] == [
        (5, f"was renamed; write {remedy} (the old name is read until version 1.0)") for remedy in remedies
    ]
    assert all(warning.key.rpartition(".")[2] in old for warning in warnings)


def test_warning_names_the_key_as_the_file_writes_it() -> None:
    """An operator searches the file for that key."""
    warnings: list[Problem] = []
    pair = PAIR.removeprefix("pools:\n").replace("*", "m").replace("//a", "//c")
    parse_config(f"{POOL}{pair}  carrier: body\nhealth:\n  failures: 5\n", warn=warnings.append)

    assert [str(warning).partition(":")[0] for warning in warnings] == [
        "line 7, pools[1].carrier",
        "line 8, health",
        "line 9, health.failures",
    ]


BOTH = {
    "section": ("health: {}\noutlier_detection: {}\n", 5, "health", "outlier_detection"),
    "key": ("admission:\n  max_token_ratio: 2\n  max_fill: 2\n", 7, "admission.max_fill", "max_token_ratio"),
    "item": ("  carrier: body\n  routing_fields: body\n", 5, "pools[0].carrier", "routing_fields"),
}


@pytest.mark.parametrize(("text", "line", "key", "name"), BOTH.values(), ids=BOTH)
def test_old_name_is_refused_beside_its_new_one(text: str, line: int, key: str, name: str) -> None:
    """It would be unclear which of the two counts."""
    with pytest.raises(ConfigError) as failed:
        parse_config(PAIR + text)

    (problem,) = failed.value.problems
    assert (problem.line, problem.key) == (line, key)
    assert problem.message == f"is the old name of {name}, which stands here, too; keep {name} alone"


def test_problem_has_the_line_of_the_old_name() -> None:
    """The warning comes before the problem, so the problem may have the new name."""
    warnings: list[Problem] = []
    with pytest.raises(ConfigError) as failed:
        parse_config(f"{POOL}health:\n  ejection: 5\n", warn=warnings.append)

    (problem,) = failed.value.problems
    assert (problem.line, problem.key) == (5, "outlier_detection.base_ejection_time")
    assert [warning.line for warning in warnings] == [4, 5]


def test_old_name_overrides_a_merged_new_one() -> None:
    """Merge keys work as with new names alone: a key of the mapping itself counts, by either name."""
    pair = PAIR.replace("- models", "- &first\n  routing_fields: headers\n  models")
    more = "- <<: *first\n  models: [m]\n  carrier: body\n  prefill: {endpoints: ['http://c:1']}\n"
    warnings: list[Problem] = []

    first, second = parse_config(f"{pair}{more}  decode: {{endpoints: ['http://d:1']}}\n", warn=warnings.append).pools

    assert (first.routing_fields.value, second.routing_fields.value) == ("headers", "body")
    assert [warning.key for warning in warnings] == ["pools[1].carrier"]


def test_old_name_is_read_in_a_merged_mapping() -> None:
    """The warning has the line of the merged mapping."""
    warnings: list[Problem] = []
    config = parse_config(f"{PAIR}  <<: {{carrier: headers}}\n", warn=warnings.append)

    assert config.pools[0].routing_fields.value == "headers"
    assert [warning.line for warning in warnings] == [5]


def test_old_value_is_kept_under_other_keys() -> None:
    """Only a renamed key has renamed values: a model may have any name."""
    text = PAIR.replace("'*'", "own, duplex").replace("models: [", "models: &names [") + "sync: {url: 'unix:///cut'}\n"

    assert parse_config(text, warn=no_warning).pools[0].models == ("own", "duplex")


@pytest.mark.parametrize("key", ["outlier_detection.failures", "x.y", "[health]", "? {health: 1}\n"])
def test_key_is_kept_if_it_is_no_plain_name(key: str) -> None:
    """The problem shows the key as the file writes it."""
    with pytest.raises(ConfigError) as failed:
        parse_config(f"{POOL}{key}: {{failures: 5}}\n", warn=no_warning)

    (problem,) = failed.value.problems
    assert problem.line == 4


def test_file_is_read_without_a_receiver_of_warnings(tmp_path: Path) -> None:
    """A caller that does not log leaves the argument out."""
    path = tmp_path / "config.yaml"
    path.write_text(f"{POOL}protocol: own\n")

    assert parse_config(path.read_text()).protocol.value == "envoy"
