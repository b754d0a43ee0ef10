"""A rollout engine of SGLang servers, which run as processes of their own, in a Python environment of their own.

| room or module | idea |
|---|---|
| engine | the asyncio side: requests in, deltas out; pauses, updates and memory |
| options, options_from_config | what servers are built from, and how a job's settings say so |
| server/ | one server: its command line, process, HTTP interface, probes and restarts |
| requests/ | a request in SGLang's terms, which server gets it, and what comes back |
| weights/ | a version into all servers, as tensors, as files, or by the trainer's broadcast |
| speculative/ | the draft model, whose weights are versioned apart |

Start at `engine`. It never converts weights: they are published in the form that SGLang's loaders know.
"""

from __future__ import annotations

from typing import Any

from miles.services.rollout.engines.sglang.engine import SglangEngine
from miles.services.rollout.engines.sglang.errors import ServerRefused, ServerUnstartable
from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.options_from_config import configured_options

__all__ = ["ServerRefused", "ServerUnstartable", "SglangEngine", "SglangOptions", "configured_options", "create"]


def create(**options: Any) -> SglangEngine:
    """Build the engine; see `SglangOptions` for its options."""
    return SglangEngine(SglangOptions(**options))
