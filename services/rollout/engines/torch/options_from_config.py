"""The torch engine's options from a job's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miles.config.speculation import speculation_of
from miles.precision.of_run import rollout_recipe

if TYPE_CHECKING:
    from miles.config import JobConfig


def configured_options(
    config: JobConfig, *, device: str, name: str, engine_addresses: Sequence[str] = ()
) -> dict[str, Any]:
    """Keyword arguments of `TorchEngine`, which has neither a name nor servers."""
    rollout = config.rollout
    return {
        "hf_checkpoint": rollout.hf_checkpoint,
        "device": device,
        "dtype": rollout.rollout_dtype,
        "max_running_requests": rollout.max_running_requests,
        "max_total_tokens": rollout.rollout_max_context_len,
        "recipe": rollout_recipe(config),
        "speculation": speculation_of(rollout.sglang_args),
    }
