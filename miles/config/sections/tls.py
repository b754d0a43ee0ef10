"""TLS between services."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Metavar, Section


class TlsConfig(Section):
    """TLS for every gRPC connection of a run; see docs/security.md."""

    tls_cert: Annotated[str | None, Metavar("FILE")] = None
    """Certificate chain of all services (PEM), which must name the addresses that they listen on."""

    tls_key: Annotated[str | None, Metavar("FILE")] = None
    """Private key of the certificate (PEM)."""

    tls_ca: Annotated[str | None, Metavar("FILE")] = None
    """Trusted CA certificates (PEM); defaults to those of the system."""

    tls_mutual: bool = False
    """Mutual TLS: require clients to have a certificate signed by tls_ca."""
