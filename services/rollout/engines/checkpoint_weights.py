"""The weights of a Hugging Face checkpoint: for engines without a weight-sync service, and as the base of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def read_weights(hf_checkpoint: str, dtype: str) -> dict[str, torch.Tensor]:
    """Read every parameter by name, tied ones once, in `dtype` ("float32" or "bfloat16"), to the CPU.

    Uses transformers, because a checkpoint's files may name and split parameters differently from the model.
    Raises OSError or ValueError when the folder has no weights that fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(hf_checkpoint, dtype=kind)
    return {name: parameter.detach().to(kind) for name, parameter in model.named_parameters(remove_duplicate=True)}
