"""Encryption between services."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Metavar, Section


class TlsConfig(Section):
    """TLS for every gRPC connection of a run; docs/security.md says more."""

    tls_cert: Annotated[str | None, Metavar("FILE")] = None
    """Certificate chain that every service shows, PEM. It must name the addresses on which services listen."""

    tls_key: Annotated[str | None, Metavar("FILE")] = None
    """Its private key, PEM."""

    tls_ca: Annotated[str | None, Metavar("FILE")] = None
    """Certificates of the authorities to trust, PEM; without it, those of the system."""

    tls_mutual: bool = False
    """Have clients show the certificate too, and refuse those without one that tls_ca vouches for."""
