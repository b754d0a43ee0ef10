"""What each inference engine can take: its description, which the trainer and the config rules ask too.

An engine is a folder in `services/rollout/engines` with the engine's name, and an entry in `ENGINE_SPECS`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

EngineName = Literal["torch", "sglang"]
WeightForm = Literal["module", "checkpoint"]
"""How a model's tensors are named and cut: as transformers' modules hold them, a layer's experts in one tensor, or as
the files of Hugging Face checkpoints do, each expert's matrices under names of their own."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What an engine loads, holds and can do, whatever the model."""

    name: EngineName
    runs_servers: bool
    """Whether the model runs in server processes beside the rollout service, which settings start or attach."""
    weight_formats: frozenset[str]
    """Values of rollout_weight_format that it loads."""
    weight_form: WeightForm
    """Names and shapes in which it takes a model's tensors."""
    mtp_drafts: frozenset[str]
    """Speculative algorithms whose draft is made of the policy's own MTP layers, unless a draft model is given. MTP
    layers are published for these alone."""
    draft_algorithms: frozenset[str] | None
    """Speculative algorithms, in SGLang's words, that it verifies drafts of; None: its servers say so themselves."""
    unties: frozenset[str]
    """Types of models whose tied head it keeps apart from the embeddings, so that it needs the tensor by both names."""
    experts_everywhere: frozenset[str]
    """Types of models that it builds with experts in every layer, whatever their configuration says."""
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
            weight_formats=frozenset({"as_trained", "fp8_block", "int4", "mxfp8", "nvfp4"}),
            weight_form="module",
            mtp_drafts=frozenset(),
            draft_algorithms=frozenset({"EAGLE3", "NGRAM", "STANDALONE"}),
            unties=frozenset(),
            experts_everywhere=frozenset(),
            adapter_base_on_device=True,
            frees_memory=False,
            default_max_running_requests=64,
        ),
        "sglang": EngineSpec(
            name="sglang",
            runs_servers=True,
            weight_formats=frozenset({"as_trained", "fp8_block", "int4"}),
            weight_form="checkpoint",
            mtp_drafts=frozenset({"EAGLE", "NEXTN"}),
            draft_algorithms=None,
            unties=frozenset({"glm4_moe", "minimax_m2", "qwen2_moe", "qwen3_moe"}),
            experts_everywhere=frozenset({"qwen2_moe", "qwen3_moe"}),
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
