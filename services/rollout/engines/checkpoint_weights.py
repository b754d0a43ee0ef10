"""The weights of a Hugging Face checkpoint: for engines without a weight-sync service, and as the base of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def read_weights(hf_checkpoint: str, dtype: str) -> dict[str, torch.Tensor]:
    """Read all parameters and persistent buffers by name in the module form, tied ones once, to the CPU.

    They have `dtype` ("float32" or "bfloat16"), but for the few that are always in float32. Uses transformers, because
    a checkpoint's files may name and split parameters differently from the model. Raises OSError or ValueError when the
    folder has no weights that fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from miles.weights.naming.model_tensors import once, read_model_tensors

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(hf_checkpoint, dtype=kind)
    weights = once(model.state_dict(keep_vars=True))
    tensors = read_model_tensors(hf_checkpoint)
    return {name: w.detach().to(tensors.exported_dtype(name, w.dtype, kind)) for name, w in weights.items()}
