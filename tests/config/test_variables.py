"""Environment variables in the values of a file: ``${NAME}``, ``${NAME:-default}``; ``$${`` for a literal ``${``."""

import pytest

from dp_extproc.config import Config, ConfigError, parse_config

POOL = "pools:\n- models: ['*']\n  workers: {endpoints: ['http://a:1']}\n"
ENVIRONMENT = {
    "IP": "10.1.2.3", "N": "3", "EMPTY": "", "NAME": "m", "YAML": "{a: b}", "OLD": "own", "REF": "${N}",
    "SECRET": "hunter2", "URL": "redis://:hunter2@10.0.0.7",
}  # fmt: skip


def config_of(text: str) -> Config:
    return parse_config(text, environment=ENVIRONMENT)


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as failed:
        config_of(text)
    assert "hunter2" not in str(failed.value)
    return [str(problem) for problem in failed.value.problems]


EQUAL = {
    "in a text": (POOL + "listen:\n  advertise: ${IP}:9002\n", POOL + "listen: {advertise: 10.1.2.3:9002}\n"),
    "number": (POOL + "listen:\n  workers: ${N}\n", POOL + "listen: {workers: 3}\n"),
    "default": (POOL + "listen:\n  workers: ${NONE:-2}\n", POOL + "listen: {workers: 2}\n"),
    "default for empty": (POOL + "drain: ${EMPTY:-5s}\n", POOL + "drain: 5s\n"),
    "empty default": (POOL + "listen:\n  advertise: ${NONE:-}\n", POOL + "listen: {advertise: null}\n"),
    "quoted": (POOL.replace("'*'", "'${N}'"), POOL.replace("'*'", "'3'")),
    "in flow": (POOL.replace("http://a:1", "http://${IP}:${N}"), POOL.replace("http://a:1", "http://10.1.2.3:3")),
    "dollar": (POOL.replace("*", "$N $ $$ a$"), POOL.replace("*", "$N $ $$ a$")),
    "no reference in a value": (POOL.replace("*", "${REF}"), POOL.replace("*", "$${N}")),
    "no structure": (POOL.replace("'*'", "'${YAML}'"), POOL.replace("'*'", "'{a: b}'")),
    "block": (POOL.replace("['*']", "\n  - >-\n    ${NAME}"), POOL.replace("*", "m")),
    "old name": (POOL + "protocol: ${OLD}\n", POOL),
    "comment": (POOL + "# ${NONE} ${\n", POOL),
    "alias": (POOL + "drain: &d ${N}s\nload:\n  interval: *d\n", POOL + "drain: 3s\nload: {interval: 3s}\n"),
    "merged": (POOL + "listen:\n  <<: {workers: '${N}', grpc: '${IP}:1'}\n  workers: 1\n",
               POOL + "listen: {grpc: 10.1.2.3:1}\n"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "same"), EQUAL.values(), ids=EQUAL)
def test_reference_is_replaced_by_its_variable(text: str, same: str) -> None:
    """Only values have references, and a plain value has the type of what the variable holds."""
    assert config_of(text) == config_of(same)


def test_doubled_dollar_gives_a_literal_reference() -> None:
    """A value may need the characters themselves."""
    assert config_of(POOL.replace("*", "$${N} $${")).pools[0].models == ("${N} ${",)


MISTAKES = {
    "unset": (
        POOL + "listen:\n  grpc: ${NONE}:1\n  workers: ${NONE}\ndrain: 5\n",
        [
            "line 5, listen.grpc: the variable NONE is not set; set it, or write ${NONE:-default}",
            "line 6, listen.workers: the variable NONE is not set; set it, or write ${NONE:-default}",
            "line 7, drain: write a duration with its unit",
        ],
    ),
    "unset in a list": (
        POOL.replace("'http://a:1'", "'http://${NONE}:1', 'http://${N'"),
        [
            "line 3, pools[0].workers.endpoints[0]: the variable NONE is not set",
            "line 3, pools[0].workers.endpoints[1]: write ${NAME} or ${NAME:-default}, or $${",
        ],
    ),
    "no name": (POOL + "drain: ${1}\n", ["line 4, drain: write ${NAME} or ${NAME:-default}"]),
    "nested": (POOL + "drain: ${NONE:-${N}}\n", ["line 4, drain: write ${NAME} or ${NAME:-default}"]),
    "other operator": (POOL + "drain: ${N:?no}\n", ["line 4, drain: write ${NAME} or ${NAME:-default}"]),
    "wrong value": (POOL + "drain: ${N}\n", ["line 4, drain: write a duration with its unit"]),
    "wrong type": (
        POOL + "listen: {workers: '${N}'}\n",
        ["line 4, listen.workers: input should be a valid integer, not '3'; write it without quotes"],
    ),
    "key": (POOL + "'${NAME}': 1\n", ["line 4, ${NAME}: is not a known key"]),
    "key for the key's place": (
        POOL + "  api_key: ${SECRET}\n",
        ["line 4, pools[0].api_key: must be a mapping with keys such as env, file, not the value that stands here"],
    ),
    "key for its variable": (
        POOL + "  api_key: {env: '${SECRET}!'}\n", ["line 4, pools[0].api_key.env: string should match pattern"],
    ),
    "key in a list": (POOL + "  policy: ['${SECRET}']\n", ["line 4, pools[0].policy: must be a mapping"]),
    "key in a mapping": ("pools: {api_key: '${SECRET}'}\n", ["line 1, pools: must be a list, not a mapping"]),
    "bus": (POOL + "sync:\n  url: x${URL}\n", ["line 5, sync.url: write redis://host:port"]),
    "bus without key": (POOL + "sync: ${URL}\n", ["line 4, sync: must be a mapping with the key url"]),
    "password in an endpoint": (
        POOL.replace("a:1", "u:${SECRET}@a:1"),
        ["line 3, pools[0].workers.endpoints[0].url: write the engine's address"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_reported_with_line_key_and_remedy_but_no_secret(text: str, expected: list[str]) -> None:
    """All are reported at once, and an unset variable is one mistake, not two."""
    found = problems_of(text)

    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True))


def test_plain_reference_in_a_flow_collection_is_reported_with_its_remedy() -> None:
    """YAML itself reads the braces."""
    (problem,) = problems_of(POOL + "listen: {advertise: ${IP}:9002}\n")

    assert problem.endswith("between [ ] and { } a value with ${...} needs quotes")
