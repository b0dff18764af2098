"""HTTP to the servers of the test bed, which are asked over and over while something is waited for."""

import ssl
from typing import Final

import httpx

CLIENT: Final = httpx.Client(
    # They speak plain HTTP. To load the certificates that would verify others costs 50 ms of a processor each time.
    verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    trust_env=False,
    # Servers come and go on one port: a connection to the one before is no good.
    limits=httpx.Limits(max_keepalive_connections=0),
)
