"""The web page and REST API of a run."""

from __future__ import annotations

from typing import Annotated

from miles.config.schema.section import Derived, Metavar, Negated, Port, Section


class GatewayConfig(Section):
    """Web page and REST API; see docs/gateway.md."""

    gateway: Annotated[bool, Negated("--no-gateway")] = True
    """Do not start the gateway (web page and REST API)."""

    gateway_host: str = "127.0.0.1"
    """Address that the gateway listens on; any but a loopback address requires gateway_keys_file."""

    gateway_port: Port = 0
    """Port of the gateway; 0 picks a free one."""

    gateway_keys_file: Annotated[str | None, Metavar("FILE")] = None
    """File of API keys, made by `miles keys create`; without it only this machine is served, without keys."""

    gateway_allowed_root: Annotated[tuple[str, ...], Derived("the working directory"), Metavar("DIR")] = ()
    """Folder that must contain all files named by jobs that are submitted over REST; repeatable."""

    gateway_allowed_module: Annotated[tuple[str, ...], Metavar("MODULE")] = ()
    """Module or package from which jobs that are submitted over REST may load functions; repeatable."""
