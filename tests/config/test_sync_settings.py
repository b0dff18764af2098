"""The bus between replicas: what it may be, and that its password is never shown."""

import pytest

from dp_extproc.config import ConfigError, SyncSettings, parse_config

POOL = "pools:\n- models: ['*']\n  workers: {endpoints: ['http://a:1']}\n"
SECRET = "hunter2"


def settings_of(text: str) -> SyncSettings:
    """Read a section."""
    settings = parse_config(f"{POOL}sync: {text}\n").sync
    assert settings is not None
    return settings


def test_a_service_is_alone_by_default() -> None:
    """Without the section there is no bus."""
    assert parse_config(POOL).sync is None


def test_the_defaults() -> None:
    """A URL is enough."""
    settings = settings_of("{url: 'redis://a'}")

    assert (settings.url.get_secret_value(), settings.channel, settings.peer_timeout) == (
        "redis://a",
        "dp-extproc",
        3.0,
    )


@pytest.mark.parametrize(
    ("url", "directory"),
    [
        ("redis://10.0.0.1:6379", None),
        ("redis://[::1]:6379/0", None),
        (f"redis://user:{SECRET}@redis.example:6379/3", None),
        (f"rediss://:{SECRET}%40@redis.example/?ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=false", None),
        ("unix:///run/dp-extproc", "/run/dp-extproc"),
    ],
    ids=["plain", "ipv6", "credentials", "tls", "unix"],
)
def test_a_bus_is_named_by_a_url(url: str, directory: str | None) -> None:
    """Redis with or without TLS and password, or a directory of this host."""
    settings = settings_of(f"{{url: '{url}'}}")

    assert settings.url.get_secret_value() == url
    assert settings.directory == directory


@pytest.mark.parametrize(
    ("section", "key", "fragment"),
    [
        (f"redis://:{SECRET}@a", "sync", "must be a mapping with the key url"),
        (f"[redis://:{SECRET}@a]", "sync", "must be a mapping with the key url"),
        (f"{{url: [redis://:{SECRET}@a]}}", "sync.url", "write redis://host:port"),
        (f"{{url: ':{SECRET}@a:6379'}}", "sync.url", "write redis://host:port"),
        (f"{{url: 'http://:{SECRET}@a'}}", "sync.url", "write redis://host:port"),
        ("{url: 'redis://'}", "sync.url", "write redis://host:port"),
        (f"{{url: 'redis://:{SECRET}/x@a:6379'}}", "sync.url", "%2F"),
        (f"{{url: 'redis://:{SECRET}#x@a:6379'}}", "sync.url", "%23"),
        (f"{{url: 'redis://:{SECRET}@a:0'}}", "sync.url", "write redis://host:port"),
        (f"{{url: 'redis://:{SECRET}@a:99999'}}", "sync.url", "write redis://host:port"),
        (f"{{url: 'redis://:{SECRET}@a/channel'}}", "sync.url", "write redis://host:port"),
        (f"{{url: 'redis://:{SECRET}@a?ssl_ca_certs=/ca.pem'}}", "sync.url", "with rediss:// only"),
        (f"{{url: 'rediss://:{SECRET}@a?protocol=3'}}", "sync.url", "ssl_ca_certs"),
        ("{url: 'unix://run/dp'}", "sync.url", "absolute path"),
        ("{url: 'unix:'}", "sync.url", "absolute path"),
        ("{url: 'unix:///run/dp?x=1'}", "sync.url", "absolute path"),
        (f"{{url: 'unix:///{'x' * 80}'}}", "sync.url", "at most 80 bytes"),
        ("{url: 'redis://a', channel: 'a b'}", "sync.channel", "pattern"),
        ("{url: 'redis://a', peer_timeout: 500ms}", "sync.peer_timeout", "write 1s or more"),
    ],
    ids=[
        "text", "list", "list_of_urls", "no_scheme", "http", "no_host", "slash_in_password", "hash_in_password",
        "port_0", "port_99999", "no_database", "option_without_tls", "option_of_no_tls", "relative", "no_directory",
        "query", "long_directory", "blank_in_channel", "short_peer_timeout",
    ],
)  # fmt: skip
def test_another_bus_is_refused(section: str, key: str, fragment: str) -> None:
    """The mistake is told with its remedy, and without the password."""
    with pytest.raises(ConfigError) as failed:
        settings_of(section)

    (problem,) = failed.value.problems
    assert (problem.line, problem.key) == (4, key)
    assert fragment in problem.message
    assert SECRET not in str(failed.value)


def test_the_password_is_not_shown() -> None:
    """However a configuration is printed, the URL of its bus is not."""
    config = parse_config(f"{POOL}sync: {{url: 'redis://:{SECRET}@a'}}\n")

    assert SECRET not in f"{config} {config!r} {config.model_dump()} {config.model_dump_json()}"
