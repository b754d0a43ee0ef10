"""Expert indices in the narrowest data type that holds them, and the layers of a model that have experts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_EXPERTS = 65536
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts")


def expert_dtype(num_experts: int) -> np.dtype[Any]:
    """Return the type of expert indices: uint8 up to 256 experts, uint16 up to 65536; else raise ValueError."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts = {num_experts}; allowed: 1 to {MAX_EXPERTS}")
    return np.dtype("<u1" if num_experts <= 256 else "<u2")


def narrow_experts(indices: npt.NDArray[np.integer[Any]], num_experts: int) -> npt.NDArray[np.integer[Any]]:
    """Narrow expert indices, any integer type and shape, to `expert_dtype(num_experts)`.

    Returns the array itself when it already has that type. Raises ValueError naming the first index outside
    [0, num_experts), TypeError when `indices` does not hold integers.
    """
    dtype = expert_dtype(num_experts)
    if not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(f"expert indices have dtype {indices.dtype}; expected integers")
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < num_experts:
        outside = np.argwhere((indices < 0) | (indices >= num_experts))[0]
        position = tuple(int(i) for i in outside)
        raise ValueError(f"expert index {indices[position]} at {position} is outside [0, {num_experts})")
    return np.ascontiguousarray(indices, dtype=dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The shape of a model's routed experts."""

    layers: int
    """Layers of the model, dense ones included."""
    moe_layers: tuple[int, ...]
    """Those that have experts."""
    top_k: int
    experts: int

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """uint8 when every expert's number fits, else uint16."""
        return np.uint8 if self.experts <= 256 else np.uint16


def expert_layout(config: Mapping[str, Any]) -> ExpertLayout | None:
    """The layout of the model that a config.json describes; None for a dense one."""
    text = config.get("text_config") or config
    experts = next((int(text[key]) for key in _COUNTS if text.get(key)), 0)
    top_k = next((int(text[key]) for key in _CHOSEN if text.get(key)), 0)
    if not experts or not top_k:
        return None
    layers = int(text["num_hidden_layers"])
    return ExpertLayout(layers, tuple(i for i in range(layers) if _is_sparse(text, i)), top_k, experts)


def read_expert_layout(hf_checkpoint: str) -> ExpertLayout | None:
    """Read the layout of a checkpoint's model."""
    return expert_layout(json.loads((pathlib.Path(hf_checkpoint) / "config.json").read_text(encoding="utf-8")))


def _is_sparse(text: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has experts, by the keys that the model families use."""
    if layer in (text.get("mlp_only_layers") or ()):
        return False
    if layer < int(text.get("first_k_dense_replace") or 0):
        return False
    if (types := text.get("mlp_layer_types")) is not None:
        return bool(types[layer] == "sparse")
    frequency = text.get("moe_layer_freq")
    if isinstance(frequency, list):
        return bool(frequency[layer])
    if frequency:
        return layer % int(frequency) == 0
    return (layer + 1) % int(text.get("decoder_sparse_step") or 1) == 0
