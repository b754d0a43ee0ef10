"""The weights of a Hugging Face checkpoint, for an engine that no weight-sync service feeds."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def read_weights(hf_checkpoint: str | pathlib.Path, dtype: str) -> dict[str, torch.Tensor]:
    """Every parameter by name, floating-point ones converted to `dtype` ("float32" or "bfloat16").

    Raises FileNotFoundError when the folder has no safetensors files.
    """
    import torch
    from safetensors.torch import load_file

    folder = pathlib.Path(hf_checkpoint)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [folder / "model.safetensors"]
    missing = [str(path) for path in files if not path.exists()]
    if missing:
        raise FileNotFoundError(f"hf_checkpoint {folder} lacks its weights: {', '.join(missing)}")
    target: torch.dtype = getattr(torch, dtype)
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        weights.update(load_file(path))
    return {name: tensor.to(target) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
