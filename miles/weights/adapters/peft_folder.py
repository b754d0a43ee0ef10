"""Adapters on disk as PEFT keeps them: adapter_config.json and adapter_model.safetensors in a folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from miles.weights.adapters.lora import adapted_weights
from miles.weights.manifest import ManifestError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_rslora": (False,),
    "use_dora": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ((), []),
    "layers_to_transform": ((), []),
    "target_parameters": ((), []),
    "trainable_token_indices": ((), {}),
}
"""Settings of PEFT with the values, beside null, under which an adapter is A and B for each weight and nothing more."""


@dataclasses.dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter and what it is made for."""

    rank: int
    alpha: float
    tensors: Mapping[str, torch.Tensor]
    """A (rank, inputs) and B (outputs, rank) by PEFT's names."""


def read(folder: pathlib.Path) -> PeftAdapter:
    """The adapter in a folder.

    Raises FileNotFoundError when a file is missing, and ValueError when the adapter is more than plain LoRA.
    """
    from safetensors.torch import load_file

    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')}; only LORA adapters can be read")
    odd = [key for key, plain in _PLAIN.items() if config.get(key) is not None and config[key] not in plain]
    if odd:
        raise ValueError(f"{path}: {', '.join(f'{key} = {config[key]}' for key in odd)}; only plain LoRA can be read")
    tensors = load_file(folder / WEIGHTS_FILE)
    try:
        adapted_weights(tensors)
    except ManifestError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from error
    return PeftAdapter(int(config["r"]), float(config["lora_alpha"]), tensors)


def write(folder: pathlib.Path, adapter: PeftAdapter, base: str) -> None:
    """Write an adapter to a new folder; `base` is the folder or name of the model that it adapts."""
    from safetensors.torch import save_file

    targets = sorted(weight.removesuffix(".weight") for weight in adapted_weights(adapter.tensors))
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in adapter.tensors.items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
