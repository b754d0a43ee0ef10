"""A rollout engine for any Hugging Face causal language model on CPU or one GPU, in the rollout service's own process.

| room or module | idea |
|---|---|
| engine | the asyncio side: requests in, deltas out |
| worker | the thread that steps the generator |
| generation/ | which request computes what next, and which token it gets |
| model/ | a Hugging Face model that computes packed rows over a KV cache |

Start at `engine`; `generation/scheduler` and `model/forward` are the core of a step.
"""

from __future__ import annotations

from typing import Any

from miles.services.rollout.engines.torch.engine import TorchEngine
from miles.services.rollout.engines.torch.options_from_config import configured_options

__all__ = ["TorchEngine", "configured_options", "create"]


def create(**options: Any) -> TorchEngine:
    """Build the engine; see `TorchEngine` for its options."""
    return TorchEngine(**options)
