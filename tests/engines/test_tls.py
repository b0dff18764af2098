"""Names in the certificates of engines, and the explanation of failed TLS connections."""

import ssl

import pytest

from dp_extproc.engines.tls import has_name, refusal_of

CERTIFICATE = {"subjectAltName": (("DNS", "*.LLM.svc"), ("DNS", "engine.test"), ("URI", "spiffe://a/engine"))}


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("engine.test", True),
        ("ENGINE.test", True),
        ("decode.llm.svc", True),
        ("spiffe://a/engine", True),
        ("llm.svc", False),
        ("a.decode.llm.svc", False),
        ("spiffe://a/Engine", False),
        ("spiffe://a", False),
        ("other.test", False),
    ],
)
def test_a_certificate_fits_by_one_of_its_names(name: str, fits: bool) -> None:
    """A wildcard stands for one label, and URIs are compared as they are."""
    assert has_name(CERTIFICATE, ["nowhere.test", name]) is fits
    assert not has_name({}, [name])


def test_only_failures_of_tls_are_explained() -> None:
    """A refused connection, or a handshake that has not ended, has another remedy."""
    cause = ConnectionError("no")
    cause.__cause__ = ssl.SSLCertVerificationError(1, "expired")

    assert refusal_of(cause) == ("TLS failed: expired; compare engine_tls.ca and engine_tls.names with its certificate")
    assert refusal_of(ConnectionRefusedError()) is None
    assert refusal_of(ssl.SSLWantReadError()) is None


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "engine_tls.cert"),
        ("TLSV1_ALERT_UNKNOWN_CA", "engine_tls.cert"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "engine_tls.cert"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "versions of TLS"),
        ("TLSV1_UNRECOGNIZED_NAME", "engine_tls.sni"),
        ("WRONG_VERSION_NUMBER", "it seems not to speak TLS"),
    ],
)
def test_the_remedy_follows_from_the_alert(reason: str, remedy: str) -> None:
    """Not every refusal of an engine is about a certificate."""
    error = ssl.SSLError(1, "failed")
    error.reason = reason

    assert remedy in (refusal_of(error) or "")
