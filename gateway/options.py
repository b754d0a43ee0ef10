"""What a gateway is told when it is started."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayOptions:
    """Settings of one gateway process."""

    controller: str
    """host:port of the controller."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    keys_file: pathlib.Path | None = None
    """File of hashed API keys; None serves this machine alone, without keys."""
    allowed_roots: tuple[pathlib.Path, ...] = ()
    """Folders below which paths in a job's configuration must lie; absolute and without symbolic links."""
    runs_dir: pathlib.Path | None = None
    """Where run folders of jobs that name none are made; None refuses such jobs."""
    allowed_modules: tuple[str, ...] = ()
    """Modules and packages from which a job may load functions."""
    allowed_passthrough: tuple[str, ...] = ()
    """Settings passed through to an engine (sglang_...) that a job may give."""
    max_body_bytes: int = 1 << 20
    requests_per_s: float = 200.0
    """Rate limit of one key, or of this machine when there are no keys."""
    burst: int = 400
    """Requests that may come at once before the rate limit holds."""
    max_watchers: int = 2000
    """Event streams open at once."""
    stream_s: float = 3600.0
    """An event stream ends after so long; its reader goes on with Last-Event-ID."""
    heartbeat_s: float = 15.0
    """A silent event stream says so often that it lives."""
