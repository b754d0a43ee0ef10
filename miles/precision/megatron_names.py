"""Megatron-Core's names of the modules that hold a matrix of a Hugging Face model, and patterns of such names."""

from __future__ import annotations

import dataclasses
import fnmatch
import re

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^(?:mlp|block_sparse_moe)\.experts\.\d+\.")
_SHARED = re.compile(r"^mlp\.shared_experts?\.")
_FC1 = ("linear_fc1",)
_MLP = {"gate_proj": _FC1, "up_proj": _FC1, "w1": _FC1, "w3": _FC1, "down_proj": ("linear_fc2",), "w2": ("linear_fc2",)}
_ATTENTION = {
    "q_proj": ("linear_qkv", "linear_q_proj"),
    "k_proj": ("linear_qkv",),
    "v_proj": ("linear_qkv",),
    "qkv_proj": ("linear_qkv",),
    "o_proj": ("linear_proj",),
    "q_a_proj": ("linear_q_down_proj",),
    "q_b_proj": ("linear_q_up_proj",),
    "kv_a_proj_with_mqa": ("linear_kv_down_proj",),
    "kv_b_proj": ("linear_kv_up_proj",),
}


@dataclasses.dataclass(frozen=True, slots=True)
class ModulePattern:
    """What Megatron-Core's modules with names like this one do; the first pattern that matches decides."""

    glob: str
    """Matched with the whole name, such as decoder.layers.0.mlp.linear_fc1."""
    kept: bool
    """Whether they are left out of the format."""


def modules_of(name: str) -> tuple[str, ...]:
    """Names that Megatron-Core may have for the module with this matrix of a Hugging Face model.

    Layers are counted through the whole model, and experts of a layer are one module. A matrix without a known
    counterpart keeps its name within the layer.
    """
    found = _LAYER.search(name.removesuffix(".weight"))
    if found is None:
        return ()
    within, leaf = found[2], found[2].rpartition(".")[2]
    if _EXPERT.match(within):
        inner = tuple(f"mlp.experts.{each}" for each in _MLP.get(leaf, (leaf,)))
    elif _SHARED.match(within):
        inner = tuple(f"mlp.shared_experts.{each}" for each in _MLP.get(leaf, (leaf,)))
    elif within.startswith("mlp."):
        inner = tuple(f"mlp.{each}" for each in _MLP.get(leaf, (leaf,)))
    elif within.startswith("self_attn.") and within.count(".") == 1:
        inner = tuple(f"self_attention.{each}" for each in _ATTENTION.get(leaf, (leaf,)))
    else:
        inner = (within.replace("self_attn.", "self_attention.", 1),)
    return tuple(f"decoder.layers.{found[1]}.{each}" for each in inner)


def is_kept(patterns: tuple[ModulePattern, ...], name: str) -> bool:
    """Whether patterns leave the matrix of this name, a Hugging Face model's, out of the format."""
    modules = modules_of(name) if patterns else ()
    for pattern in patterns:
        if any(fnmatch.fnmatchcase(module, pattern.glob) for module in modules):
            return pattern.kept
    return False
