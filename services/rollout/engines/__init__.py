"""Inference engines, chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.services.rollout.engines.base import RolloutEngine

ENGINES = ("torch", "sglang")


def create_engine(name: str, /, **options: Any) -> RolloutEngine:
    """Build the engine called `name` with its own options; nothing is loaded before `start`.

    Raises ValueError for a name that is not in `ENGINES`.
    """
    if name == "torch":
        from miles.services.rollout.engines.torch import TorchEngine

        return TorchEngine(**options)
    if name == "sglang":
        from miles.services.rollout.engines.sglang import SglangEngine, SglangOptions

        return SglangEngine(SglangOptions(**options))
    raise ValueError(f"unknown rollout backend {name!r}: choose one of {', '.join(ENGINES)}")


def configured_engine(
    config: JobConfig, *, device: str, name: str, engine_addresses: Sequence[str] = ()
) -> RolloutEngine:
    """The engine that a job's configuration asks for, on a device ("cpu", "cuda:1", "auto", ...).

    `name` tells this worker from others; `engine_addresses`: servers to attach to.
    """
    rollout = config.rollout
    if rollout.rollout_backend == "torch":
        return create_engine(
            "torch",
            hf_checkpoint=rollout.hf_checkpoint,
            device=device,
            dtype=rollout.rollout_dtype,
            max_running_requests=rollout.max_running_requests,
            max_total_tokens=rollout.rollout_max_context_len,
        )
    from miles.services.rollout.engines.sglang.options_from_config import sglang_settings

    return create_engine(
        "sglang", **sglang_settings(config, device=device, name=name, engine_addresses=engine_addresses)
    )
