"""Folders of draft models: config.json and safetensors, as SGLang starts from them."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_FILE = "model.safetensors"
_FIRST_LAYER = ("midlayer.", "layers.0.")
"""How the authors' own files name a head's one layer, and how it is named here; SGLang takes both."""


def read_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by the names that they have there. ValueError when it has no safetensors file."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights in safetensors files, which a draft model needs here")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def module_name(name: str) -> str:
    """The name in `Eagle3Head` of a tensor that may come under another one, as SGLang takes it too."""
    name = name.removeprefix("model.")
    return name.replace(*_FIRST_LAYER, 1) if name.startswith(_FIRST_LAYER[0]) else name


def write_draft(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    beside: pathlib.Path | None = None,
) -> None:
    """Write a folder, in place of one that is there; it appears when it is complete.

    `beside`: a folder whose other files, such as the tokenizer's, are copied.
    """
    from safetensors.torch import save_file

    partial = folder.with_name(f".{folder.name}.miles-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in sorted(beside.iterdir()) if beside is not None else ():
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja") and "index" not in path.name:
            shutil.copyfile(path, partial / path.name)
    (partial / "config.json").write_text(json.dumps(dict(config), indent=2))
    save_file(
        {name: each.detach().cpu().contiguous() for name, each in tensors.items()}, partial / _FILE, {"format": "pt"}
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
