"""TLS of both ports."""

from __future__ import annotations

import ssl

from droidspeak.config import TlsSettings
from droidspeak.errors import ConfigError

__all__ = ["server_context"]


def server_context(tls: TlsSettings) -> ssl.SSLContext:
    """A server's context; with a client CA, clients must show a certificate. Raises `ConfigError`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.client_ca:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS: {tls.certificate}, {tls.key}: {error}") from None
    return context
