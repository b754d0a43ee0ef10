"""The weights of a Hugging Face checkpoint: for engines without a weight-sync service, and as the base of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def read_weights(hf_checkpoint: str, dtype: str) -> dict[str, torch.Tensor]:
    """Read all parameters and persistent buffers by name in the module form, tied ones once, to the CPU.

    Floating-point ones have `dtype` ("float32" or "bfloat16"). Uses transformers, because a checkpoint's files may name
    and split parameters differently from the model. Raises OSError or ValueError when the folder has no weights that
    fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from miles.weights.naming.model_tensors import once

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(hf_checkpoint, dtype=kind)
    weights = once(model.state_dict(keep_vars=True))
    return {name: w.detach().to(kind if w.is_floating_point() else w.dtype) for name, w in weights.items()}
