"""What each inference engine can take: its description, which the trainer and the config rules ask too.

An engine is a folder in `services/rollout/engines` with the engine's name, and an entry in `ENGINE_SPECS`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

EngineName = Literal["torch", "sglang"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine loads, holds and can do, whatever the model."""

    name: EngineName
    runs_servers: bool
    """Whether the model runs in server processes beside the rollout service, which settings start or attach."""
    weight_formats: frozenset[str]
    """Values of rollout_weight_format that it loads."""
    fused_experts: bool
    """Whether the trainer sends a layer's experts as one tensor, as transformers' models hold them; otherwise each
    expert's matrices are sent under names of their own, as in checkpoints."""
    adapter_base_on_device: bool
    """Whether the rollout service keeps the weights that adapters are merged into on the engine's device; otherwise in
    host memory, because the servers need their GPU to themselves."""
    frees_memory: bool
    """Whether `release_memory` frees its weights and cache, so that it can take turns with the trainer on a GPU."""
    default_max_running_requests: int | None
    """Requests that decode at once when max_running_requests is not given; None: the engine decides."""


ENGINE_SPECS: Mapping[EngineName, EngineSpec] = types.MappingProxyType(
    {
        "torch": EngineSpec(
            name="torch",
            runs_servers=False,
            weight_formats=frozenset({"as_trained", "fp8_block"}),
            fused_experts=True,
            adapter_base_on_device=True,
            frees_memory=False,
            default_max_running_requests=64,
        ),
        "sglang": EngineSpec(
            name="sglang",
            runs_servers=True,
            weight_formats=frozenset({"as_trained"}),
            fused_experts=False,
            adapter_base_on_device=False,
            frees_memory=True,
            default_max_running_requests=None,
        ),
    }
)


def engine_spec(name: str) -> EngineSpec:
    """The description of the engine that rollout_backend names. Raises ValueError for an unknown one."""
    for spec in ENGINE_SPECS.values():
        if spec.name == name:
            return spec
    raise ValueError(f"unknown rollout backend {name!r}: choose one of {', '.join(ENGINE_SPECS)}")
