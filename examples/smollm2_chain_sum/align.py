"""Pad a mixture that `upcycle` made with zeros to the sizes that low-precision kernels take; its answers stay.

FP8 with a scale per block of 128 × 128 wants sizes that are multiples of 128: SGLang refuses others, and only with such
heads do the blocks of Megatron's fused query, key and value matrix fall together with those of the matrices apart.
SmolLM2-135M has a hidden size of 576 and heads of 64.

- hidden size D → D': embeddings, and what reads from or adds to the residual stream, get zeros. A norm then takes its
  mean over D' elements, of which D are not zero; weights times sqrt(D / D') and an epsilon times D / D' make up for it.
- head size H → H' = m · H: dimensions i and i + H/2, which rotary embeddings turn together, go to m·i and m·i + H'/2,
  whose frequency is the same. Queries times sqrt(m) make up for the softmax scale, 1 / sqrt(H').
- feed-forward size: hidden units whose weights are zero.

Gradients of the padding are zero too, so training leaves it as it is. Dims: D hidden, H head size.
"""

from __future__ import annotations

import math
import re
from typing import Any

FEED_FORWARD_SIZES = ("intermediate_size", "moe_intermediate_size")
_NORM = re.compile(r"(?:layernorm|\.norm)\.weight$")


def aligned_config(config: Any, multiple: int) -> Any:
    """The configuration of the padded model. Raises ValueError for one that padding would change."""
    rope = config.rope_parameters
    if (
        config.model_type != "glm4_moe"
        or config.use_qk_norm
        or (rope["rope_type"], rope["partial_rotary_factor"]) != ("default", 1.0)
    ):
        raise ValueError(
            f"only a glm4_moe with plain rotary embeddings of whole heads and no norms of queries and keys can be "
            f"padded, not this {config.model_type} with {rope}, use_qk_norm={getattr(config, 'use_qk_norm', None)}"
        )
    padded = type(config).from_dict(config.to_dict())
    padded.hidden_size = _up(config.hidden_size, multiple)
    padded.head_dim = math.lcm(config.head_dim, multiple)
    padded.rms_norm_eps = config.rms_norm_eps * config.hidden_size / padded.hidden_size
    for name in FEED_FORWARD_SIZES:
        setattr(padded, name, _up(getattr(config, name), multiple))
    return padded


def aligned(model: Any, multiple: int) -> Any:
    """A model of the same class and dtype with the logits of `model`, whose sizes are multiples of `multiple`.

    The vocabulary stays. Raises ValueError; see `aligned_config`.
    """
    from transformers import AutoModelForCausalLM

    config = aligned_config(model.config, multiple)
    padded: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    source = model.state_dict()
    for name, weight in padded.state_dict().items():
        weight.copy_(_padded(name, source[name], tuple(weight.shape), model.config, config))
    padded.generation_config = model.generation_config
    return padded


def _padded(name: str, weight: Any, shape: tuple[int, ...], old: Any, new: Any) -> Any:
    """A tensor of the padded model."""
    factor = new.head_dim // old.head_dim
    if _NORM.search(name):
        weight = weight * math.sqrt(old.hidden_size / new.hidden_size)
    if name.endswith("q_proj.weight"):
        weight = weight * math.sqrt(factor)
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        weight = _spread(weight, factor)
    elif name.endswith("o_proj.weight"):
        weight = _spread(weight.T, factor).T
    elif name.endswith("gate_up_proj"):  # (experts, 2 · feed-forward size, D): gates, then ups
        experts, rows, columns = shape
        return _grown(weight.unflatten(1, (2, -1)), (experts, 2, rows // 2, columns)).flatten(1, 2)
    return _grown(weight, shape)


def _spread(weight: Any, factor: int) -> Any:
    """Rows (heads · H, D), each followed by factor - 1 rows of zeros: row m·i of a head is its row i."""
    rows = weight.new_zeros((weight.shape[0], factor, weight.shape[1]))
    rows[:, 0] = weight
    return rows.flatten(0, 1)


def _grown(tensor: Any, shape: tuple[int, ...]) -> Any:
    """The tensor with zeros at the end of each dimension."""
    grown = tensor.new_zeros(shape)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
