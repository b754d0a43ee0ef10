"""The web page and REST API of a run."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Derived, Metavar, Negated, Port, Section


class GatewayConfig(Section):
    """Web page and REST API; docs/gateway.md says more."""

    gateway: Annotated[bool, Negated("--no-gateway")] = True
    """Serve neither web page nor REST API."""

    gateway_host: str = "127.0.0.1"
    """Address on which the gateway listens; any but this machine's own needs gateway_keys_file."""

    gateway_port: Port = 0
    """Port of the gateway; 0 picks a free one."""

    gateway_keys_file: Annotated[str | None, Metavar("FILE")] = None
    """File of API keys, made by `miles keys create`; without one only this machine is served, and needs no key."""

    gateway_allowed_root: Annotated[tuple[str, ...], Derived("the working directory"), Metavar("DIR")] = ()
    """Folder below which files named by jobs that are submitted over REST must lie. Repeatable."""

    gateway_allowed_module: Annotated[tuple[str, ...], Metavar("MODULE")] = ()
    """Module or package from which jobs that are submitted over REST may load functions. Repeatable."""
