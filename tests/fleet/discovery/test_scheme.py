"""All engines have one scheme, whatever reports them."""

from collections.abc import Hashable

import pytest

from dp_extproc.config import parse_config
from dp_extproc.engines.model import SourceKind
from dp_extproc.fleet.discovery.scheme import with_scheme
from dp_extproc.fleet.discovery.source import Member
from dp_extproc.fleet.discovery.sources import role_sources

PLAIN = (Member("http://10.0.0.1:1", "10.0.0.1", 1), Member("http://[fd00::1]:1", "fd00::1", 1))
TLS = "engine_tls: {ca: /ca, names: [a]}\n"


@pytest.mark.parametrize("kind", [SourceKind.DNS, SourceKind.KUBERNETES])
def test_addresses_get_the_scheme_of_the_configuration(kind: SourceKind) -> None:
    """Such a source has no scheme of its own."""
    assert with_scheme(PLAIN, kind, has_tls=False) == PLAIN
    found = with_scheme(PLAIN, kind, has_tls=True)
    assert [each.url for each in found if isinstance(each, Member)] == ["https://10.0.0.1:1", "https://[fd00::1]:1"]


@pytest.mark.parametrize(
    ("url", "has_tls", "reason"),
    [("http://a:1", True, "engine_tls applies to"), ("https://a:1", False, "https:// needs")],
)
def test_a_file_with_another_scheme_cannot_be_used(url: str, has_tls: bool, reason: str) -> None:
    """Otherwise Envoy would speak TLS to some engine without TLS, or the other way round."""
    member = Member(url, "a", 1)

    assert str(with_scheme((member,), SourceKind.FILE, has_tls=has_tls)).startswith(f"{url}: {reason}")
    assert with_scheme((member,), SourceKind.FILE, has_tls=not has_tls) == (member,)


@pytest.mark.parametrize("tls", ["", TLS])
def test_sources_have_the_scheme_of_the_configuration(tls: str) -> None:
    """The section applies to every role of every pool."""
    pool = "pools: [{models: ['*'], prefill: {dns: {name: p, port: 1}}, decode: {file: {path: /d}}}]"
    places: list[Hashable] = [each.place.has_tls for each in role_sources(parse_config(tls + pool))]

    assert places == [bool(tls)] * 2
