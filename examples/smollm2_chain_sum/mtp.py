"""Layers for multi-token prediction (MTP) that have learnt nothing, for a folder of a GLM-4.5-like model.

Their names are those of published models: layers behind the last one (DeepSeek-V3, https://arxiv.org/abs/2412.19437).
"""

from __future__ import annotations

import json
import pathlib


def add_mtp_layers(folder: pathlib.Path, count: int, *, seed: int = 0) -> None:
    """Add `count` layers to the folder's one file of weights and to its config.json.

    Each is a copy of the last layer behind a random projection of embedding and hidden state, with norms of ones.
    Raises ValueError for a model in several files.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} has no model.safetensors; write the model in one file")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(file)
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    last = f"model.layers.{layers - 1}."
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        own = f"model.layers.{layers + number}."
        added = {own + name.removeprefix(last): each.clone() for name, each in tensors.items() if name.startswith(last)}
        projection = torch.randn(width, 2 * width, generator=generator) * config["initializer_range"]
        norm = tensors["model.norm.weight"]
        added |= {f"{own}{name}.weight": torch.ones_like(norm) for name in ("enorm", "hnorm")}
        added |= {f"{own}shared_head.norm.weight": norm.clone(), f"{own}eh_proj.weight": projection.to(norm.dtype)}
        tensors |= added
    save_file(tensors, file, metadata={"format": "pt"})
    config["num_nextn_predict_layers"] = count
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
