"""The TLS context of connections to engines, which follows the files of ``engine_tls``."""

import logging
import ssl
from typing import Final

from dp_extproc.config import EngineTls, Problem
from dp_extproc.engines.tls import TlsContext, named_peer
from dp_extproc.runtime.tls_files import Signature, file_signature, unreadable

_SECTION: Final = "engine_tls"

_log = logging.getLogger(__name__)


def make_context(settings: EngineTls) -> ssl.SSLContext | tuple[Problem, ...]:
    """Make a context of the files as they are now, or return why they cannot be used."""
    if problems := tuple(unreadable(_SECTION, settings.files)):
        return problems
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the names are verified by the class below; the chain is verified by OpenSSL
    context.sslobject_class = named_peer(settings.names)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_verify_locations(settings.ca)
    except (OSError, ValueError) as error:
        return (Problem(None, f"{_SECTION}.ca", f"{settings.ca} holds no certificate: {error}"),)
    if settings.cert is not None:
        try:
            context.load_cert_chain(settings.cert, settings.key, password="")  # without one OpenSSL would ask for it
        except (OSError, ValueError) as error:
            message = f"{settings.cert} and {settings.key} are not a certificate and its key: {error}"
            return (Problem(None, _SECTION, message),)
    return context


class FollowedTls:
    """TLS to engines, with the files as they were when :meth:`renew` could use them last."""

    def __init__(self, settings: EngineTls) -> None:
        """Set up; no file is read before :meth:`renew`."""
        self.context = TlsContext()
        """The context for every HTTP client. It stays the same object when the files change."""
        self._settings = settings
        self._seen: Signature = ()
        """Signature of the files that are in use."""

    def renew(self) -> tuple[Problem, ...]:
        """Read the files if they have changed, and use them for new connections.

        Returns:
            The problems of files that cannot be used. Those that were read before stay in use.
        """
        try:
            now = file_signature(self._settings.files.values())
        except OSError:
            now = ()
        if now and now == self._seen:
            return ()
        made = make_context(self._settings)
        if not isinstance(made, ssl.SSLContext):
            return made
        if self._seen:
            _log.info("TLS: new connections to engines use the changed files of engine_tls")
        self.context.use(made, self._settings.sent_name)
        self._seen = now
        return ()


def engine_context(settings: EngineTls | None) -> ssl.SSLContext | None:
    """Make the context of connections to engines from the files as they are now; None without ``engine_tls``.

    It trusts no certificate if a file cannot be used.
    """
    if settings is None:
        return None
    followed = FollowedTls(settings)
    followed.renew()
    return followed.context


def problems_of_engine_tls(settings: EngineTls | None) -> tuple[Problem, ...]:
    """Find the problems of the files of ``engine_tls``."""
    found = () if settings is None else make_context(settings)
    return found if isinstance(found, tuple) else ()
