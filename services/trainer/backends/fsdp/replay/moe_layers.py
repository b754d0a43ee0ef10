"""Mixture-of-experts layers of transformers' models: where their routing can be read and replaced.

All of them call `experts(hidden, experts_TK, weights_TK)` with what the router chose from the logits that `gate` gives.
Two kinds of routers are known: softmax over all experts (Qwen2-MoE, Qwen3-MoE, OLMoE), and sigmoid with a bias that
decides who is chosen but not with which weight (DeepSeek-V3 and V3.2, GLM-4.5, MiniMax-M2).

Dims: T rows, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class MoeLayer:
    """One layer."""

    gate: torch.nn.Module
    """Gives the logits [T, E], alone or as the first of several results."""
    experts: torch.nn.Module
    """Called with hidden states, experts [T, K] and their weights [T, K]."""
    top_k: int
    is_sigmoid: bool
    is_normalised: bool
    """Whether the weights of a token's experts add up to one, before scaling."""
    scaling: float

    def weigh(self, logits_TE: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """The weights that the router would have given these experts; float32 [T, K], with gradients."""
        logits_TE = logits_TE.float()
        scores_TE = logits_TE.sigmoid() if self.is_sigmoid else logits_TE.softmax(dim=-1)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.is_normalised:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK * self.scaling


def find_moe_layers(model: torch.nn.Module) -> list[MoeLayer]:
    """The layers in order. Raises ValueError when there is none with a known router."""
    layers = [layer for module in model.modules() if (layer := _moe_layer(module)) is not None]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no router whose choice can be replaced, so there is no routing to replay or "
            "observe; turn off use_routing_replay, use_rollout_routing_replay and observe_rollout_routing"
        )
    return layers


def _moe_layer(module: Any) -> MoeLayer | None:
    gate, experts = getattr(module, "gate", None), getattr(module, "experts", None)
    if gate is None or experts is None:
        return None
    if all(hasattr(gate, attribute) for attribute in ("top_k", "num_experts", "norm_topk_prob")):
        return MoeLayer(gate, experts, int(gate.top_k), False, bool(gate.norm_topk_prob), 1.0)
    if hasattr(module, "route_tokens_to_experts") and hasattr(gate, "e_score_correction_bias"):
        scaling = float(module.routed_scaling_factor)
        return MoeLayer(gate, experts, int(module.top_k), True, bool(module.norm_topk_prob), scaling)
    if hasattr(gate, "top_k") and hasattr(module, "e_score_correction_bias"):  # MiniMax-M2's scores add up to one
        return MoeLayer(gate, experts, int(gate.top_k), True, True, 1.0)
    return None


def check_experts(experts_TLK: torch.Tensor, layers: Sequence[MoeLayer]) -> None:
    """Raise ValueError unless experts [T, layers, K] are of a model with these layers."""
    count, top_k = experts_TLK.shape[1:]
    if (count, top_k) != (len(layers), layers[0].top_k):
        raise ValueError(
            f"routing of {count} layers and {top_k} experts per token does not fit a model with "
            f"{len(layers)} mixture-of-experts layers and {layers[0].top_k} experts per token"
        )
