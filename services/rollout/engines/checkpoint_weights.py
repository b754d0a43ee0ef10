"""The weights of a Hugging Face checkpoint: what an engine serves that no weight-sync service feeds, and what adapters
are merged into."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def read_weights(hf_checkpoint: str, dtype: str) -> dict[str, torch.Tensor]:
    """Every parameter by name, tied ones once, in `dtype` ("float32" or "bfloat16"), on the CPU.

    Goes through transformers, because a checkpoint's files may name and split parameters otherwise than the model does.
    Raises OSError or ValueError when the folder holds no weights that fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(hf_checkpoint, dtype=kind)
    return {name: parameter.detach().to(kind) for name, parameter in model.named_parameters(remove_duplicate=True)}
