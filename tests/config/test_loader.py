"""The configuration file: the values that it takes, and the reports of its mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

from dp_extproc.config import Config, ConfigError, ConfigFile, LoadSource, RankPolicy, SocketAddress, parse_config

POOL = "pools:\n- models: ['*']\n  workers: {endpoints: ['http://a:1']}\n"
"""Three lines that make a valid file."""

FULL = """\
listen: {grpc: 127.0.0.1:9002, admin: "[::1]:9090", advertise: 10.0.0.9:9002}
envoy:
  {inference: 0.0.0.0:8080, admin: 127.0.0.1:9901, max_body_bytes: 67108864, body_mode: full_duplex_streamed,
   service: dp:9002}
load: {source: loads, interval: 500ms, stale_after: 2m, timeout: 1.5s, max_page_bytes: 1MiB}
drain: 1h
pools:
- models: ["*"]
  prefill:
    endpoints:
    - http://10.0.0.1:31001
    - {url: "http://[::1]:31002/", bootstrap_port: 8999, bootstrap_host: b, dp_size: 4}
  decode:
    endpoints: ["http://decode-1.example:32001"]
  policy: {host: power_of_two, dp_rank: none, client_dp_rank: honour}
- models: [small, "org/other"]
  workers: {endpoints: ["http://127.0.0.1:33001"]}
"""


def problems_of(text: str) -> list[tuple[int | None, str, str]]:
    with pytest.raises(ConfigError) as failed:
        parse_config(text)
    for problem in failed.value.problems:
        assert str(problem) in str(failed.value)
    return [(problem.line, problem.key, problem.message) for problem in failed.value.problems]


def test_parse_config_reads_every_kind_of_value() -> None:
    """Durations become seconds, sizes bytes, addresses hosts and ports. Endpoints keep their values."""
    config = parse_config(FULL)
    assert config.listen.admin == SocketAddress(host="::1", port=9090)
    assert str(config.listen.admin) == "[::1]:9090"
    assert config.envoy.inference.is_wildcard
    assert not config.listen.grpc.is_wildcard
    assert (config.load.source, config.load.max_page_bytes) == (LoadSource.LOADS, 1 << 20)
    assert (config.load.interval, config.load.stale_after, config.load.timeout, config.drain) == (0.5, 120, 1.5, 3600)
    large, small = config.pools
    assert (large.is_disaggregated, small.is_disaggregated) == (True, False)
    assert (large.name, small.name) == ("*", "small,org/other")
    assert large.policy.dp_rank is RankPolicy.NONE
    assert large.prefill is not None
    first, second = large.prefill.endpoints
    assert (first.url, first.host, first.port, first.bootstrap_port) == (
        "http://10.0.0.1:31001",
        "10.0.0.1",
        31001,
        None,
    )
    assert (second.url, second.host, second.port, second.dp_size) == ("http://[::1]:31002", "::1", 31002, 4)


def test_parse_config_takes_defaults_for_all_but_pools() -> None:
    """A file with pools alone is complete."""
    config = parse_config(POOL)
    assert config == Config(pools=config.pools)
    assert (config.load.interval, config.envoy.max_body_bytes) == (1.0, 64 << 20)


MISTAKES: dict[str, tuple[str, list[tuple[int | None, str, str]]]] = {
    "empty": ("", [(None, "", "must be a mapping")]),
    "comment-alone": ("# nothing\n", [(None, "", "must be a mapping")]),
    "list": ("- a\n", [(None, "", "must be a mapping")]),
    "scalar": ("5\n", [(None, "", "must be a mapping")]),
    "no-pools": ("drain: 1s\n", [(1, "pools", "is missing")]),
    "pools-of-nothing": ("pools:\n", [(1, "pools", "must be a list, not nothing")]),
    "empty-pools": ("pools: []\n", [(1, "pools", "name at least one")]),
    "pools-as-a-mapping": ("pools: {a: b}\n", [(1, "pools", "must be a list")]),
    "pool-as-a-string": (
        "pools: [a]\n",
        [(1, "pools[0]", "keys such as models, prefill, decode, workers, engine, routing_fields, policy")],
    ),
    "tab": ("pools:\n\t- a\n", [(2, "", "not valid YAML: found character '\\t'")]),
    "unclosed": (POOL + "load: {interval: 1s\n", [(5, "", "not valid YAML")]),
    "two-documents": (POOL + "---\n" + POOL, [(4, "", "another document")]),
    "unknown-tag": (POOL + "drain: !!python/name:os.system\n", [(4, "", "could not determine a constructor")]),
    "unknown-alias": (POOL + "load: *none\n", [(4, "", "undefined alias")]),
    "nul-character": (POOL + "\0", [(None, "", "not valid YAML")]),
    "impossible-date": (POOL + "drain: 2024-13-45\n", [(4, "", "month must be in 1..12")]),
    "wrong-tag": (POOL + "drain: !!timestamp x\n", [(4, "", "not valid YAML")]),
    "impossible-number": (POOL + "load: {interval: 0b_}\n", [(4, "", "not valid YAML")]),
    "number-of-5000-digits": (POOL + f"drain: {'9' * 5000}\n", [(4, "", "not valid YAML")]),
    "nested-too-deeply": ("pools: " + "[" * 1000, [(None, "", "nested too deeply")]),
    "list-that-holds-itself": ("pools: &a [*a]\n", [(1, "pools[0]", "must be a mapping")]),
    "workers-without-ports": (
        POOL + "listen: {grpc: 127.0.0.1:65535, workers: 2}\n",
        [(4, "listen", "2 workers take the ports from grpc on, so it has to be in 1-65534")],
    ),
    "workers-on-the-admin-port": (
        POOL + "listen: {grpc: 0.0.0.0:9089, admin: 127.0.0.1:9090, workers: 2}\n",
        [(4, "listen", "2 workers take the ports 9089-9090; put admin on another one")],
    ),
    "tls-with-two-certificates": (
        POOL + "listen: {tls: {cert: a, key: b, self_signed: true}}\n",
        [(4, "listen.tls", "either cert and key, or self_signed")],
    ),
    "tls-with-half-a-certificate": (
        POOL + "listen: {tls: {cert: a}}\n",
        [(4, "listen.tls", "cert and key belong together")],
    ),
    "self-signed-certificate-for-the-printed-envoy": (
        POOL + "listen: {tls: {self_signed: true}}\n",
        [(1, "", "listen.tls.self_signed is for protocol: endpoint_picker")],
    ),
    "health-of-several-processes": (
        POOL + "listen: {health: '0.0.0.0:9003', workers: 2}\n",
        [(4, "listen", "health is for one process")],
    ),
    "tls-on-one-side": (
        POOL + "listen: {tls: {cert: a, key: b}}\n",
        [(1, "", "listen.tls needs envoy.service_tls")],
    ),
    "half-a-certificate": (
        POOL + "envoy: {service_tls: {ca: a, name: dp, cert: b}}\n",
        [(4, "envoy.service_tls", "cert and key belong together")],
    ),
    "half-a-client-certificate": (
        "engine_tls: {ca: a, names: [b], cert: c}\n" + POOL.replace("http:", "https:"),
        [(1, "engine_tls", "cert and key belong together")],
    ),
    "tls-for-some-engines": (
        "engine_tls: {ca: a, names: [b]}\n" + POOL,
        [(4, "pools[0].workers.endpoints[0]", "engine_tls applies to the engines of all pools: write https://")],
    ),
    "engines-with-unknown-certificates": (
        POOL.replace("http:", "https:"),
        [(3, "pools[0].workers.endpoints[0]", "https:// needs the section engine_tls")],
    ),
    "address-for-a-name": (
        "engine_tls: {ca: a, names: [10.0.0.1]}\n" + POOL.replace("http:", "https:"),
        [(1, "engine_tls.names[0]", "IP addresses in certificates are not compared")],
    ),
    "envoy-without-the-client-certificate": (
        "engine_tls: {ca: a, names: [b], cert: c, key: d}\n"
        "envoy: {engine_tls: {sds: {cluster: sds, ca: ROOTCA}}}\n" + POOL.replace("http:", "https:"),
        [(1, "", "name its secret in envoy.engine_tls.sds.certificate")],
    ),
    "collector-with-a-scheme": (
        POOL + "envoy: {tracing: {collector: 'http://otel:4317'}}\n",
        [(4, "envoy.tracing.collector", "without a scheme")],
    ),
    "ranks-of-a-service": (
        "pools: [{models: ['*'], workers: {kubernetes: {service: a, ranks_by_port: true}}}]\n",
        [(1, "pools[0].workers.kubernetes[0]", "ranks_by_port is for the ports of an inference_pool")],
    ),
    "name-with-a-port": (
        "engine_tls: {ca: a, names: ['b:1']}\n" + POOL.replace("http:", "https:"),
        [(1, "engine_tls.names[0]", "write a DNS name")],
    ),
    "credentials-for-all-origins": (
        POOL + "envoy: {cors: {allow_origins: ['*'], allow_credentials: true}}\n",
        [(4, "envoy.cors", "would let every page act for its user")],
    ),
    "origin-with-a-path": (
        POOL + "envoy: {cors: {allow_origins: ['https://a/b']}}\n",
        [(4, "envoy.cors.allow_origins[0]", "without a path")],
    ),
    "key-itself": (
        "pools: [{models: [m], workers: {endpoints: ['http://a:1']}, api_key: {value: sk-1}}]\n",
        [(1, "pools[0].api_key.value", "is not a known key")],
    ),
    "key-from-two-places": (
        "pools: [{models: [m], workers: {endpoints: ['http://a:1']}, api_key: {env: A, file: b}}]\n",
        [(1, "pools[0].api_key", "write either env: NAME_OF_A_VARIABLE or file:")],
    ),
    "unknown-reload": (POOL + "reload: always\n", [(4, "reload", "is not one of 'signal' or 'watch'")]),
    "repeated-key": (POOL + "drain: 1s\ndrain: 2s\n", [(5, "drain", "stands twice")]),
    "repeated-key-inside": (POOL + "load:\n  interval: 1s\n  interval: 1s\n", [(6, "load.interval", "stands twice")]),
    "repeated-merge": (POOL + "load:\n  <<: {}\n  <<: {}\n", [(6, "load.<<", "stands twice")]),
    "key-that-yaml-takes-for-a-boolean": (POOL + "load: {}\non: 1\n", [(5, "on", "not a word to YAML")]),
    "key-that-yaml-takes-for-a-number": (POOL + "load: {5: 5}\n", [(4, "load.5", "not a word to YAML")]),
    "list-as-a-key": (POOL + "[a]: 5\n", [(4, "", "unhashable key")]),
    "misspelt-key": (POOL + "laod: {}\n", [(4, "laod", "did you mean 'load'?")]),
    "unknown-key": (
        POOL + "colour: red\n",
        [
            (
                4,
                "colour",
                (
                    "known keys here: listen, envoy, protocol, prefill_leg, picker, load, drain, reload, sync, "
                    "supervision, retry, outlier_detection, "
                ),
            )
        ],
    ),
    "misspelt-key-of-an-endpoint": (
        "pools:\n- models: [a]\n  workers:\n    endpoints:\n    - url: http://a:1\n      dp_sise: 4\n",
        [(6, "pools[0].workers.endpoints[0].dp_sise", "did you mean 'dp_size'?")],
    ),
    "section-as-a-list": (POOL + "listen: [1]\n", [(4, "listen", "must be a mapping with keys such as grpc, admin")]),
    "section-of-nothing": (POOL + "load:\n", [(4, "load", "must be a mapping")]),
    "models-as-a-string": (POOL.replace("['*']", "'*'"), [(2, "pools[0].models", "must be a list, not '*'")]),
    "model-as-a-number": (POOL.replace("'*'", "7"), [(2, "pools[0].models[0]", "put it in quotes")]),
    "no-models": (POOL.replace("'*'", ""), [(2, "pools[0].models", "name at least one")]),
    "empty-model": (POOL.replace("'*'", "''"), [(2, "pools[0].models[0]", "at least 1 character")]),
    "no-endpoints": (POOL.replace("'http://a:1'", ""), [(3, "pools[0].workers.endpoints", "name at least one")]),
    "unknown-policy": (
        POOL + "  policy: {host: least, dp_rank: 5}\n",
        [
            (4, "pools[0].policy.host", "'least_requests', 'round_robin', 'random' or 'power_of_two'"),
            (4, "pools[0].policy.dp_rank", "5 is not one of 'minimum_tokens', 'token_round_robin' or 'none'"),
        ],
    ),
    "lockstep-without-its-estimate": (
        POOL + "load: {signal: scraped}\n",
        [(2, "pools[0].policy.host", "write another host policy, such as random or round_robin")],
    ),
    "lockstep-said-but-without-its-estimate": (
        POOL + "  policy: {host: lockstep}\nload: {signal: scraped}\n",
        [(4, "pools[0].policy.host", "lockstep needs load.signal: estimate")],
    ),
    "session-header-that-is-none": (
        POOL + "envoy: {session_header: 'x session'}\n",
        [(4, "envoy.session_header", "write the name of a request header, such as x-session-id")],
    ),
    "session-header-of-ours": (
        POOL + "envoy: {session_header: X-DP-Session}\n",
        [(4, "envoy.session_header", "names under x-dp-, x-envoy- and x-override- are taken from clients")],
    ),
    "session-header-of-the-engines": (
        POOL + "envoy: {session_header: X-Override-Rid}\n",
        [(4, "envoy.session_header", "names under x-dp-, x-envoy- and x-override- are taken from clients")],
    ),
    "session-header-of-gateways": (
        POOL + "envoy: {session_header: X-Gateway-Destination-Endpoint}\n",
        [(4, "envoy.session_header", "X-Gateway-Destination-Endpoint is not the name of a conversation; write")],
    ),
    "session-header-with-a-secret": (
        POOL + "envoy: {session_header: Authorization}\n",
        [(4, "envoy.session_header", "Authorization is not the name of a conversation; write a header")],
    ),
    "session-header-that-frames": (
        POOL + "envoy: {session_header: content-length}\n",
        [(4, "envoy.session_header", "content-length is not the name of a conversation; write a header")],
    ),
    "session-header-that-routes": (
        POOL + "envoy: {session_header: X-Data-Parallel-Rank}\n",
        [(4, "envoy.session_header", "X-Data-Parallel-Rank is not the name of a conversation; write a header")],
    ),
    "standby-without-a-port": (
        POOL + "envoy: {standby: [10.0.0.9]}\n",
        [(4, "envoy.standby[0]", "write host:port, such as dp-extproc:9002 or 10.0.0.9:9002")],
    ),
    "workers-beside-decode": (POOL + "  decode: {endpoints: ['http://b:1']}\n", [(2, "pools[0]", "split this one")]),
    "prefill-without-decode": (
        POOL.replace("workers", "prefill"),
        [(2, "pools[0]", "needs prefill and decode (disaggregated), or workers (aggregated)")],
    ),
    "everything-repeated": (
        (
            "pools:\n"
            "- models: [a, b]\n  prefill: {endpoints: ['http://a:1']}\n  decode: {endpoints: ['http://a:1']}\n"
            "- models: [c, a]\n  workers:\n    endpoints:\n    - http://b:1\n    - http://a:1/\n"
            "- models: [b]\n  workers: {endpoints: ['http://c:1']}\n"
        ),
        [
            (4, "pools[0].decode.endpoints[0]", "http://a:1 is in pools[0].prefill.endpoints[0]"),
            (5, "pools[1].models[1]", "model 'a' is in pools[0] and in pools[1]"),
            (9, "pools[1].workers.endpoints[1]", "http://a:1 is in pools[0].prefill.endpoints[0]"),
            (10, "pools[2].models[0]", "model 'b' is in pools[0] and in pools[2]"),
        ],
    ),
    "stale-before-the-next-scrape": (
        POOL + "load: {interval: 5s, stale_after: 5s}\n",
        [(4, "load", "stale_after must be longer than interval")],
    ),
    "address-as-a-mapping": (
        POOL + "listen: {grpc: {host: localhost, port: 99999}}\n",
        [
            (4, "listen.grpc.host", "write an IP address"),
            (4, "listen.grpc.port", "less than or equal to 65535"),
        ],
    ),
    "service-without-port": (POOL + "envoy: {service: dp-extproc}\n", [(4, "envoy.service", "write host:port")]),
    "bootstrap-port-0": (
        POOL.replace("'http://a:1'", "{url: 'http://a:1', bootstrap_port: 0}"),
        [(3, "pools[0].workers.endpoints[0].bootstrap_port", "greater than or equal to 1")],
    ),
    "bootstrap-host-with-a-port-path": (
        POOL.replace("'http://a:1'", "{url: 'http://a:1', bootstrap_host: 'http://x/'}"),
        [(3, "pools[0].workers.endpoints[0].bootstrap_host", "pattern")],
    ),
    "bootstrap-host-with-a-port": (
        POOL.replace("'http://a:1'", "{url: 'http://a:1', bootstrap_host: '10.0.0.1:8998'}"),
        [(3, "pools[0].workers.endpoints[0].bootstrap_host", "a port goes into a key of its own")],
    ),
    "bootstrap-host-in-brackets-that-is-none": (
        POOL.replace("'http://a:1'", "{url: 'http://a:1', bootstrap_host: '[10.0.0.1]'}"),
        [(3, "pools[0].workers.endpoints[0].bootstrap_host", "is no IPv6 address")],
    ),
    "dp-size-as-a-string": (
        POOL.replace("'http://a:1'", "{url: 'http://a:1', dp_size: '4'}"),
        [(3, "pools[0].workers.endpoints[0].dp_size", "valid integer, not '4'")],
    ),
    "endpoint-without-url": (
        POOL.replace("'http://a:1'", "{dp_size: 4}"),
        [(3, "pools[0].workers.endpoints[0].url", "is missing")],
    ),
    "mistake-in-a-merged-mapping": (
        (
            "pools:\n- models: [a]\n  workers: {endpoints: ['http://a:1']}\n  policy: &policy\n    host: nope\n"
            "- models: [b]\n  workers: {endpoints: ['http://b:1']}\n  policy:\n    <<: *policy\n    dp_rank: nope\n"
        ),
        [
            (5, "pools[0].policy.host", "'nope' is not one of"),
            (5, "pools[1].policy.host", "'nope' is not one of"),
            (10, "pools[1].policy.dp_rank", "'nope' is not one of"),
        ],
    ),
    "several-of-them": (
        (
            "drain: 5\nenvoy: {max_body_bytes: 1MB}\n"
            "pools:\n- models: []\n  prefil: {}\n- modles: [x]\n  decode: {}\nload: {source: all}\n"
        ),
        [
            (1, "drain", "write a duration with its unit"),
            (2, "envoy.max_body_bytes", "write a number of bytes"),
            (4, "pools[0].models", "name at least one"),
            (5, "pools[0].prefil", "did you mean 'prefill'?"),
            (6, "pools[1].models", "is missing"),
            (6, "pools[1].modles", "did you mean 'models'?"),
            (7, "pools[1].decode", "write endpoints, dns, file or kubernetes"),
            (8, "load.source", "'all' is not one of 'auto', 'loads' or 'metrics'"),
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_parse_config_reports_every_mistake_with_place_and_remedy(
    text: str, expected: list[tuple[int | None, str, str]]
) -> None:
    """All mistakes are reported at once, in the order of the file, with line, key and remedy."""
    found = problems_of(text)
    assert [(line, key) for line, key, _ in found] == [(line, key) for line, key, _ in expected]
    for (_, _, message), (_, _, fragment) in zip(found, expected, strict=True):
        assert fragment in message


DURATIONS = {"250ms": 0.25, "1s": 1.0, "1.5s": 1.5, "2m": 120.0, "1h": 3600.0}


@pytest.mark.parametrize(("text", "seconds"), DURATIONS.items(), ids=DURATIONS)
def test_duration_is_read_with_its_unit(text: str, seconds: float) -> None:
    """A duration has a unit."""
    assert parse_config(f"{POOL}drain: {text}\n").drain == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["5", "0.5", "'5'", "5 s", "-1s", "0s", "1d", "1e3s", "s", "''", "yes", "[1s]", "1:30", "9" * 400 + "s"]
)
def test_duration_is_refused_without_unit_or_positive_number(text: str) -> None:
    """A bare number leaves the unit open. Zero, negative and infinite durations make no sense."""
    ((line, key, _),) = problems_of(f"{POOL}drain: {text}\n")
    assert (line, key) == (4, "drain")


@pytest.mark.parametrize("text", ["99ms", "0.5ms", "25h", "600h"])
def test_keepalive_is_refused_outside_its_limits(text: str) -> None:
    """Envoy and gRPC take whole milliseconds, up to a limit."""
    ((line, key, _),) = problems_of(f"{POOL}listen: {{keepalive: {text}}}\n")
    assert (line, key) == (4, "listen.keepalive")


SIZES = {"1024": 1024, "1KiB": 1024, "64MiB": 64 << 20, "2GiB": 2 << 30, "0x1000": 4096}


@pytest.mark.parametrize(("text", "size"), SIZES.items(), ids=SIZES)
def test_size_is_read_with_or_without_unit(text: str, size: int) -> None:
    """A size is a number of bytes, or has a binary unit."""
    assert parse_config(f"{POOL}envoy: {{max_body_bytes: {text}}}\n").envoy.max_body_bytes == size


@pytest.mark.parametrize("text", ["1MB", "64M", "1.5MiB", "-1", "0", "1023", "yes", "'1024'", "1e6", "''", "1 KiB"])
def test_size_is_refused_with_another_unit_or_below_1_kib(text: str) -> None:
    """Decimal units would be slightly wrong, and less than 1 KiB is a mistake."""
    ((line, key, _),) = problems_of(f"{POOL}envoy: {{max_body_bytes: {text}}}\n")
    assert (line, key) == (4, "envoy.max_body_bytes")


@pytest.mark.parametrize(
    "text",
    ["localhost:1", "9002", "127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:-1", ":9002", "'[::1]'", "::"],
)
def test_listen_address_is_refused_without_ip_and_port(text: str) -> None:
    """A name is no listen address, and a port has no default."""
    ((line, key, message),) = problems_of(f"{POOL}listen: {{grpc: '{text.strip(chr(39))}'}}\n")
    assert (line, key) == (4, "listen.grpc")
    assert "such as 127.0.0.1:9002" in message


@pytest.mark.parametrize(
    "url",
    [
        "a:1", "ftp://a:1", "http://a", "http://a:0", "http://a:99999", "http://:1", "http://a:1/v1", "http://a:1?b",
        "http://a:1#b", "http://u:p@a:1", "http://a b:1", "http://[::1:1", "http://a,b:1", "", "unix:///a",
    ],
)  # fmt: skip
def test_url_is_refused_unless_http_with_host_and_port(url: str) -> None:
    """Other parts of a URL would be ignored."""
    ((line, key, _),) = problems_of(POOL.replace("http://a:1", url))
    assert (line, key) == (3, "pools[0].workers.endpoints[0].url")


def test_pools_share_values_by_merge_keys() -> None:
    """A key of the pool itself overrides a merged one."""
    config = parse_config(
        "pools:\n"
        "- &first\n  models: [a]\n  workers: {endpoints: ['http://a:1']}\n"
        "  policy: &policy {host: random, dp_rank: none}\n"
        "- models: [b]\n  workers: {endpoints: ['http://b:1']}\n  policy: {<<: *policy, host: round_robin}\n"
        "- <<: *first\n  models: [c]\n  workers: {endpoints: ['http://c:1']}\n"
    )
    assert [pool.policy.host.value for pool in config.pools] == ["random", "round_robin", "random"]
    assert {pool.policy.dp_rank for pool in config.pools} == {RankPolicy.NONE}
    assert [pool.name for pool in config.pools] == ["a", "b", "c"]


def test_nested_aliases_are_refused_without_expansion() -> None:
    """A few lines that stand for a billion values are refused at once."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 40)]
    assert {key for _, key, _ in problems_of("\n".join(lines))} == {"pools", *(f"a{level}" for level in range(40))}


def test_mistake_is_found_in_a_file_of_a_thousand_endpoints() -> None:
    """A large fleet is read, and the line of a mistake is right."""
    lines = ["pools:", "- models: ['*']", "  workers:", "    endpoints:"]
    lines += [f"    - http://10.0.{number // 250}.{number % 250}:30000" for number in range(1000)]
    assert parse_config("\n".join(lines)).pools[0].workers is not None
    lines[700] = "    - http://10.0.0.1"
    assert [(line, key) for line, key, _ in problems_of("\n".join(lines))] == [
        (701, "pools[0].workers.endpoints[696].url")
    ]


def test_message_shortens_a_long_wrong_value() -> None:
    """The message stays readable."""
    ((_, _, message),) = problems_of(f"pools: '{'x' * 100_000}'\n")
    assert len(message) < 200


def test_file_is_read_with_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    """Some editors write both."""
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + POOL.replace("\n", "\r\n").encode())
    assert parse_config(ConfigFile(path).read()) == parse_config(POOL)


UNREADABLE = {"missing": None, "latin-1": b"# caf\xe9\n", "utf-16": POOL.encode("utf-16")}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_file_is_reported_with_path_and_reason(tmp_path: Path, content: bytes | None) -> None:
    """The operator sees which file it is, and why it cannot be read."""
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: 1 problem(.|\n)*cannot be read"):
        parse_config(ConfigFile(path).read())


def test_directory_is_reported_as_unreadable(tmp_path: Path) -> None:
    """A directory gets the message of any unreadable file."""
    with pytest.raises(ConfigError, match="cannot be read"):
        ConfigFile(tmp_path).read()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dp_extproc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_every_command() -> None:
    """``python -m dp_extproc --help`` shows what there is."""
    result = _run("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: dp-extproc")
    for command in ("serve", "check", "envoy-config", "engine", "demo"):
        assert f"\n    {command}" in result.stdout


@pytest.mark.parametrize("command", ["serve", "check", "envoy-config"])
def test_command_reports_the_mistakes_of_its_file(tmp_path: Path, command: str) -> None:
    """Every command that takes the file ends with status 2 and the list of problems, without a traceback."""
    path = tmp_path / "config.yaml"
    path.write_text(POOL + "drain: 5\ncolour: red\n", encoding="utf-8")
    result = _run(command, "-c", str(path))
    assert result.returncode == 2
    assert "line 4, drain: write a duration" in result.stderr
    assert "line 5, colour: is not a known key" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("written", ["fd00::1", "[fd00::1]"])
def test_bootstrap_host_accepts_ipv6_with_or_without_brackets(written: str) -> None:
    """Both spellings are the same address."""
    config = parse_config(POOL.replace("'http://a:1'", f"{{url: 'http://a:1', bootstrap_host: '{written}'}}"))

    assert config.pools[0].workers is not None
    assert config.pools[0].workers.endpoints[0].bootstrap_host == "fd00::1"
