"""A certificate authority for tests."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

NAME = "dp-extproc.test"


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a directory."""

    directory: Path

    @classmethod
    def found(cls, directory: Path) -> "Authority":
        directory.mkdir(parents=True, exist_ok=True)
        authority = cls(directory)
        _openssl("req", "-x509", *_new_key(directory / "ca.key"), "-out", authority.ca, "-subj", "/CN=test authority")
        return authority

    @property
    def ca(self) -> str:
        return str(self.directory / "ca.pem")

    def issue(self, file: str, name: str = NAME, into: Path | None = None) -> dict[str, str]:
        """Make a certificate for a DNS name or a URI, over an existing one.

        Each file is replaced by a move, like a secret of Kubernetes.

        Args:
            file: Beginning of the names of the files.
            name: The name.
            into: Another directory for the files.

        Returns:
            The paths of the certificate and its key.
        """
        cert, key, request = (str(self.directory / f"{file}.{end}") for end in ("new", "new-key", "csr"))
        san = f"URI:{name}" if "://" in name else f"DNS:{name}"
        _openssl("req", *_new_key(Path(key)), "-out", request, "-subj", "/CN=x", "-addext", f"subjectAltName={san}")
        own = ("-CA", self.ca, "-CAkey", str(self.directory / "ca.key"), "-CAcreateserial")
        _openssl("x509", "-req", "-in", request, *own, "-copy_extensions", "copy", "-out", cert)
        folder = into or self.directory
        made = {"cert": str(folder / f"{file}.pem"), "key": str(folder / f"{file}.key")}
        Path(key).replace(made["key"])
        Path(cert).replace(made["cert"])
        return made


def _new_key(path: Path) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(path))


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
