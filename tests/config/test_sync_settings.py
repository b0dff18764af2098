"""The section ``sync``: the URLs that it takes, and the secrecy of its password."""

import pytest

from dp_extproc.config import ConfigError, SyncSettings, parse_config

POOL = "pools:\n- models: ['*']\n  workers: {endpoints: ['http://a:1']}\n"
SECRET = "hunter2"


def settings_of(text: str) -> SyncSettings:
    """Read a section."""
    settings = parse_config(f"{POOL}sync: {text}\n").sync
    assert settings is not None
    return settings


def test_sync_is_none_without_its_section() -> None:
    """There is no bus then."""
    assert parse_config(POOL).sync is None


def test_sync_needs_a_url_alone() -> None:
    """All other keys have defaults."""
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
def test_url_names_redis_or_a_directory(url: str, directory: str | None) -> None:
    """Redis may have TLS and a password; the directory is one of this host."""
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
def test_sync_is_refused_without_showing_the_password(section: str, key: str, fragment: str) -> None:
    """The problem has its remedy, and no password."""
    with pytest.raises(ConfigError) as failed:
        settings_of(section)

    (problem,) = failed.value.problems
    assert (problem.line, problem.key) == (4, key)
    assert fragment in problem.message
    assert SECRET not in str(failed.value)


def test_configuration_hides_the_password_of_the_bus() -> None:
    """No representation of a configuration has the URL of its bus."""
    config = parse_config(f"{POOL}sync: {{url: 'redis://:{SECRET}@a'}}\n")

    assert SECRET not in f"{config} {config!r} {config.model_dump()} {config.model_dump_json()}"
