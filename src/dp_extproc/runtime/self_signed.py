"""A certificate that the service makes at its start, for gateways that require TLS of an endpoint picker.

Such gateways encrypt, and verify nothing. So it protects from eavesdroppers, and not from a program that answers in
place of the service. The key never leaves the memory of the process.
"""

import datetime as dt
import importlib.util
from typing import Final

KeyAndCertificate = tuple[bytes, bytes]
"""A private key and its certificate, in PEM."""

_NAME: Final = "dp-extproc"
_VALID: Final = dt.timedelta(days=3650)
"""Longer than any process runs. A certificate is made at each start."""


def missing_library() -> str | None:
    """Return what to do if the optional library is missing; None if it is there."""
    if importlib.util.find_spec("cryptography") is not None:
        return None
    return "a self-signed certificate needs the library cryptography; install dp-extproc[picker]"


def make_certificate() -> KeyAndCertificate:
    """Make a key on the curve P-256, and a certificate that it has signed itself."""
    # It takes 60 ms to import, and only this needs it.
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))  # clocks of gateways may be late
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(encoding)
