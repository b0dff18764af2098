"""The section ``dns``: the names that it takes, and its mistakes."""

import pytest

from dp_extproc.config import ConfigError, parse_config


def config_of(dns: str) -> str:
    return f"pools:\n- models: ['*']\n  workers: {{dns: {dns}}}\n"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("decode", "decode"),
        ("my_project-decode-1.llm.svc.cluster.local.", "my_project-decode-1.llm.svc.cluster.local."),
        ("10.0.0.1", "10.0.0.1"),
        ("'[FD00::1]'", "fd00::1"),
        ("a" * 63 + ".b", "a" * 63 + ".b"),
    ],
)
def test_dns_accepts_names_and_addresses(written: str, name: str) -> None:
    """An absolute name keeps its dot, and an address is normalised."""
    (pool,) = parse_config(config_of(f"{{name: {written}, port: 30000}}")).pools
    assert pool.workers is not None
    assert [each.name for each in pool.workers.dns] == [name]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        *(
            (f"{{name: '{name}', port: 1}}", "is not a DNS name")
            for name in ("", "a..b", ".", "a b", "a:30000", "http://a", "-a", "ä", "a" * 64, "a." * 127 + "a")
        ),
        ("{name: a}", "name the port of the engines"),
        ("{name: _http._tcp.a, type: srv, port: 1}", "SRV records have ports"),
        ("{name: _http._tcp.a, port: 1}", "has SRV records; write type: srv, without port"),
        ("{name: a, type: srv}", "a name with SRV records begins with"),
        ("{name: a, port: 1, nameserver: 10.0.0.1}", "write an IP address and a port"),
        ("{name: a, port: 1, interval: 5}", "write a duration with its unit"),
    ],
)
def test_dns_refuses_what_cannot_be_looked_up(written: str, message: str) -> None:
    """Otherwise the mistake would show as a name without addresses."""
    with pytest.raises(ConfigError, match=message) as refused:
        parse_config(config_of(written))
    (problem,) = refused.value.problems
    assert problem.line == 3
