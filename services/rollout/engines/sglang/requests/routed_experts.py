"""Routed experts: which experts each token was routed to, as SGLang reports it."""

from __future__ import annotations

import binascii
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.services.rollout.engines.base import EngineFailed

_SLICE_BYTES = 1 << 18
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "top_k_experts")


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The shape of a model's routed experts, as SGLang sends them and as they are kept."""

    layers: int
    """Layers of the model: SGLang reports a row for each, also for dense ones."""
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


def decode_experts(encoded: str, layout: ExpertLayout, rows: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Decode base64 of int32 (rows, layers, top_k) to uint8 or uint16 (rows, moe_layers, top_k).

    Decodes in slices: the int32 of a long response would be large, and one call for all of it would keep other threads
    from running. Raises EngineFailed when the length is wrong or an expert does not exist.
    """
    row_bytes = layout.layers * layout.top_k * 4
    expected = 4 * -(-rows * row_bytes // 3)
    if len(encoded) != expected:
        raise EngineFailed(
            f"SGLang sent {len(encoded)} characters of expert numbers; {rows} tokens × {layout.layers} layers × "
            f"{layout.top_k} experts are {expected}"
        )
    chosen = slice(None) if len(layout.moe_layers) == layout.layers else list(layout.moe_layers)
    decoded = np.empty((rows, len(layout.moe_layers), layout.top_k), layout.dtype)
    step = 3 * max(1, _SLICE_BYTES // (3 * row_bytes))  # rows whose bytes end where a group of base64 ends
    for start in range(0, rows, step):
        end = min(start + step, rows)
        text = encoded[start * row_bytes // 3 * 4 : start * row_bytes // 3 * 4 + 4 * -(-(end - start) * row_bytes // 3)]
        try:
            wide = np.frombuffer(binascii.a2b_base64(text, strict_mode=True), np.int32)
        except ValueError as error:
            raise EngineFailed(f"SGLang sent expert numbers that are no base64 of int32: {error}") from error
        part = wide.reshape(end - start, layout.layers, layout.top_k)[:, chosen]
        if part.size and (part.min() < 0 or part.max() >= layout.experts):
            raise EngineFailed(
                f"SGLang sent expert numbers from {part.min()} to {part.max()}; the model has {layout.experts}"
            )
        decoded[start:end] = part
    return decoded


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
