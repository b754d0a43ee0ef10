"""A mixture of experts for SGLang's tests on a GPU, and what its engine's responses are compared with."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sglang_kit import DTYPE, Response, largest_difference, published_weights, reference_log_probs

from miles.services.trainer.backends.fsdp.replay.router import RoutingReplay

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "initializer_range": 0.05,
}
"""Of shapes that kernels for GPUs have, and so flat a distribution that the rounding of bfloat16 matters little."""
TOLERANCE = 0.1
"""In nats, between bfloat16 in the engine and float32; other weights differ by a nat on average."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """A mixture of experts, its weights rounded as the engine gets them, and computed in float32."""

    folder: pathlib.Path
    model: torch.nn.Module
    replay: RoutingReplay

    def weights(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """By name, each in memory of its own."""
        return {name: tensor.to(device) for name, tensor in published_weights(self.model).items()}

    def difference(self, response: Response, prompt: Sequence[int], temperature: float = 1.0) -> float:
        """Largest difference of log-probabilities, with the engine's choice of experts: near ties fall either way."""
        experts_TLK = response.result.routed_experts
        assert experts_TLK is not None
        all_TLK = np.concatenate([experts_TLK, experts_TLK[-1:]])  # the last token has none, and predicts nothing
        self.replay.replay(torch.from_numpy(all_TLK.astype(np.int64)))
        return largest_difference(response, reference_log_probs(self.model, prompt, response.tokens, temperature))


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights that the engine's type holds exactly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(DTYPE))
    return model


def together(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in one allocation, as a transport leaves them on the engine's GPU."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).cuda()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
