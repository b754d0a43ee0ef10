"""The options of a gateway process."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayOptions:
    """Options of one gateway process, from its command line."""

    controller: str
    """host:port of the controller."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    keys_file: pathlib.Path | None = None
    """File of hashed API keys; None serves only this machine, without keys."""
    allowed_roots: tuple[pathlib.Path, ...] = ()
    """Folders that must contain all files named by a job's configuration; absolute, without symbolic links."""
    runs_dir: pathlib.Path | None = None
    """Folder for the run folders of jobs that name none; None refuses such jobs."""
    allowed_modules: tuple[str, ...] = ()
    """Modules and packages from which a job may load functions."""
    allowed_passthrough: tuple[str, ...] = ()
    """Engine settings (sglang_...) that a job may give."""
    max_body_bytes: int = 1 << 20
    requests_per_s: float = 200.0
    """Rate limit per key, or of this machine when there are no keys."""
    burst: int = 400
    """Burst size of the rate limit, in requests."""
    max_watchers: int = 2000
    """Maximum number of open event streams."""
    stream_s: float = 3600.0
    """Maximum duration of an event stream; its reader continues with Last-Event-ID."""
    heartbeat_s: float = 15.0
    """Interval of comments in an event stream without events."""
