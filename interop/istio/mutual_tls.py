"""Certificates of a mesh, and the secrets that Istio's agent serves to the Envoy of a gateway."""

import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.extensions.transport_sockets.tls.v3 import common_pb2, secret_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.secret.v3 import sds_pb2_grpc

from certificates import Authority
from interop.mesh.site import Fleet, run_fleet

ENGINE: Final = "spiffe://cluster.local/ns/llm/sa/engine"
_GATEWAY: Final = "spiffe://cluster.local/ns/istio-ingress/sa/shared"
_SERVICE: Final = "spiffe://cluster.local/ns/llm/sa/dp-extproc"


@contextmanager
def run_strict_fleet(folder: Path, **sections: Any) -> Iterator[tuple[Fleet, Path]]:
    """Run a fleet whose engines take no connection without a certificate of the mesh, and an agent for the gateway.

    *sections* override those of the configuration.

    Yields:
        The fleet, and the socket of the agent.
    """
    mesh, agent = Mesh(folder / "certificates"), folder / "agent.socket"
    envoy = {"engine_tls": {"sds": {"cluster": "sds-grpc", "ca": "ROOTCA", "certificate": "default"}}}
    with (
        run_fleet(mesh.engine_options, mesh.client, engine_tls=mesh.settings, envoy=envoy, **sections) as fleet,
        mesh.serving_secrets(agent),
    ):
        yield fleet, agent


class Mesh:
    """An authority with certificates for service accounts."""

    def __init__(self, directory: Path) -> None:
        self._authority = Authority.found(directory)
        self._engine = self._authority.issue("engine", ENGINE)
        self._service = self._authority.issue("service", _SERVICE)
        self._gateway = self._authority.issue("gateway", _GATEWAY)

    @property
    def engine_options(self) -> list[str]:
        """Options of engines that take connections with a certificate of the mesh alone."""
        files = self._engine
        return ["--tls-cert", files["cert"], "--tls-key", files["key"], "--tls-client-ca", self._authority.ca]

    @property
    def client(self) -> ssl.SSLContext:
        """What the run itself needs to ask an engine."""
        context = ssl.create_default_context(cafile=self._authority.ca)
        context.check_hostname = False  # the name is a SPIFFE ID
        context.load_cert_chain(self._service["cert"], self._service["key"])
        return context

    @property
    def settings(self) -> dict[str, Any]:
        """The section ``engine_tls`` of the configuration: the files that the agent writes for the service."""
        return {"ca": self._authority.ca, "names": [ENGINE], **self._service}

    @contextmanager
    def serving_secrets(self, socket: Path) -> Iterator[None]:
        """Serve the secrets ``default`` and ``ROOTCA`` at a socket, as Istio's agent does in a gateway's pod."""
        certificate = common_pb2.TlsCertificate(
            certificate_chain=base_pb2.DataSource(filename=self._gateway["cert"]),
            private_key=base_pb2.DataSource(filename=self._gateway["key"]),
        )
        trusted = base_pb2.DataSource(filename=self._authority.ca)
        validation = common_pb2.CertificateValidationContext(trusted_ca=trusted)
        secrets = {
            "default": secret_pb2.Secret(name="default", tls_certificate=certificate),
            "ROOTCA": secret_pb2.Secret(name="ROOTCA", validation_context=validation),
        }
        server = grpc.server(ThreadPoolExecutor(8))
        sds_pb2_grpc.add_SecretDiscoveryServiceServicer_to_server(_Agent(secrets), server)
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        try:
            yield
        finally:
            server.stop(grace=None).wait()


class _Agent(sds_pb2_grpc.SecretDiscoveryServiceServicer):  # type: ignore[misc] # generated without types
    def __init__(self, secrets: dict[str, secret_pb2.Secret]) -> None:
        self._secrets = secrets

    def StreamSecrets(  # noqa: N802 - the name is gRPC's
        self, request_iterator: Iterator[discovery_pb2.DiscoveryRequest], _: grpc.ServicerContext
    ) -> Iterator[discovery_pb2.DiscoveryResponse]:
        for request in request_iterator:
            if request.version_info:  # an acknowledgement
                continue
            response = discovery_pb2.DiscoveryResponse(version_info="1", nonce="1", type_url=request.type_url)
            for name in request.resource_names:
                response.resources.add().Pack(self._secrets[name])
            yield response
